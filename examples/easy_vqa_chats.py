"""Writes the demo corpus' questions as conversations in LLaVA's JSON, which `mm1 data prepare --reader chat` reads.

    python examples/easy_vqa_chats.py --output chats.json [--split train] [--limit N]

One question is one conversation, worded as evaluation asks it. Paths of images are relative to the folder of the split:

    {"image": "images/0.png", "conversations": [
        {"from": "human", "value": "<image>Question: what is the blue shape? Short answer:"},
        {"from": "gpt", "value": "rectangle"}]}
"""

import argparse
import json
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_mm1.data.demo import DEMO_CORPUS, SPLITS
from megatron_mm1.data.files import replace_file


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the demo corpus' questions as conversations.")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE")
    parser.add_argument("--corpus", type=Path, default=DEMO_CORPUS, metavar="DIR", help="(%(default)s)")
    parser.add_argument("--split", choices=SPLITS, default="train", help="(%(default)s)")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N questions (all)")
    args = parser.parse_args()
    with (args.corpus / "raw" / "questions" / args.split / "questions.jsonl").open(encoding="utf-8") as rows:
        chats = [conversation(json.loads(row)) for row in islice(rows, args.limit)]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    replace_file(args.output, json.dumps(chats, indent=1).encode())
    print(f"{args.output}: {len(chats):,} conversations")


def conversation(row: Mapping[str, str]) -> dict[str, Any]:
    """The record of a question with its image and answer."""
    question = f"<image>Question: {row['question']} Short answer:"
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": row["answer"]}]
    return {"image": row["image"], "conversations": turns}


if __name__ == "__main__":
    main()
