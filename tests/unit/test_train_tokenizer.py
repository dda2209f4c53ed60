"""tools/train_tokenizer.py: training on a sample of data sets, and extension from the command line."""

import subprocess
import sys
from pathlib import Path

from megatron_mm1.data.readers import open_reader
from megatron_mm1.data.sampling import sample_texts
from megatron_mm1.data.tokenizer import CHAT_SYMBOLS, open_tokenizer

TOOL = Path(__file__).resolve().parents[2] / "tools" / "train_tokenizer.py"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(TOOL), *map(str, arguments)], capture_output=True, text=True)


def test_sample_is_taken_evenly_and_what_a_shard_lacks_comes_from_those_behind(tmp_path: Path) -> None:
    for name, lines in (("a", ["aaaa"] * 100), ("b", ["b"] + [" "] * 300), ("c", ["cccc"] * 200)):
        (tmp_path / f"{name}.txt").write_text("".join(line + "\n" for line in lines))
    reader = open_reader("text", tmp_path)
    everything = list(sample_texts([reader], max_bytes=10**9))
    assert [everything.count(text) for text in ("aaaa", "b", "cccc")] == [100, 1, 200]
    some = list(sample_texts([reader], max_bytes=400))
    counts = [some.count(text) for text in ("aaaa", "b", "cccc")]
    assert 20 <= counts[0] <= 40 and counts[1] == 1 and counts[2] >= 50
    assert abs(sum(map(len, some)) - 400) <= 8
    assert list(sample_texts([reader], max_bytes=0)) == []


def test_training_and_extension_from_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("red green blue square\n" * 50)
    data = ("--data", "text", tmp_path / "text.txt")
    model = tmp_path / "tokenizer.model"
    trained = run(*data, "--output", model, "--vocab-size", 285)
    assert trained.returncode == 0, trained.stderr
    ours = open_tokenizer(model)
    assert ours.vocab_size == 285 and {ours.control_id(symbol) for symbol in CHAT_SYMBOLS} == {5, 6, 7, 8}
    extended = run("--extend", model, "--output", tmp_path / "new.model")
    assert (extended.returncode, extended.stdout) == (0, f"added nothing: {tmp_path / 'new.model'}\n")
    assert run("--data", "text", "--output", model).returncode == 2
    refused = run(*data, "colour=red", "--output", model)
    assert refused.returncode == 2 and "colour" in refused.stderr
