"""What test_transformers_export runs in a process of its own, in which neither megatron nor megatron_mm1 imports.

    python transformers_runner.py REQUEST RESULT

REQUEST is a file of torch.save: for each model a dict with its `folder`, and of each prompt its `text`, the PNG
files of its `images` and their `pixel_values`; or its `contents`, as what the user of a conversation says. RESULT gets
what transformers makes of them, a dict for each model.
"""

import copy
import io
import sys

if __name__ == "__main__":
    sys.modules["megatron"] = sys.modules["megatron_mm1"] = None  # type: ignore[assignment]

import PIL.Image
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    pipeline,
)

NEW_TOKENS = 6


def run(request: dict) -> dict:
    folder, remote = request["folder"], dict(trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, **remote)
    model = AutoModelForImageTextToText.from_pretrained(folder, **remote).eval()
    images = [[PIL.Image.open(io.BytesIO(data)) for data in files] for files in request["images"]]
    prompts = list(zip(request["text"], images, strict=True))
    inputs = [processor(text=text, images=pictures) for text, pictures in prompts]

    def generate(batch: dict, **options) -> list[list[int]]:
        sequences = model.generate(**batch, max_new_tokens=NEW_TOKENS, **options)
        return [without_padding(row, model) for row in sequences[:, batch["input_ids"].shape[1] :].tolist()]

    with torch.no_grad():
        exact = [
            model(input_ids=batch["input_ids"], pixel_values=pixels if len(pixels) else None).logits[0]
            for batch, pixels in zip(inputs, request["pixel_values"], strict=True)
        ]
    together = processor(text=request["text"], images=images)
    return {
        "class": type(model).__name__,
        "config": type(AutoConfig.from_pretrained(folder, **remote)).__name__,
        "tokenizer": AutoTokenizer.from_pretrained(folder, **remote)("the <image> and </s>", add_special_tokens=False)[
            "input_ids"
        ],
        "dtype": str(model.dtype),
        "input_ids": [batch["input_ids"][0].tolist() for batch in inputs],
        "pixel_values": [batch.get("pixel_values") for batch in inputs],
        "logits": exact,
        "generated": [generate(batch)[0] for batch in inputs],
        "without_cache": generate(inputs[-1], use_cache=False),
        "static_cache": generate(inputs[-1], cache_implementation="static"),
        "together": generate(together),
        "twice": generate(together, num_return_sequences=2, do_sample=True, top_k=1),
        "decoded": processor.batch_decode(together["input_ids"], skip_special_tokens=True),
        "refused": refused(processor, model),
        "saved_again": saved_again(folder),
    }


def ask(request: dict) -> dict:
    """What a folder makes of conversations, one by one and together, and of prompts outside of any."""
    folder, remote = request["folder"], dict(trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, **remote)
    model = AutoModelForImageTextToText.from_pretrained(folder, **remote).eval()
    conversations = [
        [{"role": "user", "content": [opened(item) for item in contents]}] for contents in request["contents"]
    ]
    form = dict(add_generation_prompt=True, tokenize=True, return_dict=True)
    found: dict = {"plain": [], "chat": [], "together": []}
    for contents in request["contents"]:
        text = "".join(item.get("text", "<image>") for item in contents)
        found["plain"].append(processor(text=text, images=[opened(i)["image"] for i in contents if "image" in i]))
    if processor.chat_template is not None:
        found["chat"] = [processor.apply_chat_template(one, **form) for one in conversations]
        together = processor.apply_chat_template(conversations, **form)
        sequences = model.generate(**together, max_new_tokens=NEW_TOKENS)
        rows = sequences[:, together["input_ids"].shape[1] :].tolist()
        found["together"] = [without_padding(row, model) for row in rows]
        asked = pipeline("image-text-to-text", model=folder, **remote)
        [answer] = asked(text=conversations[1], max_new_tokens=NEW_TOKENS, return_full_text=False)
        found["piped"] = answer["generated_text"], processor.decode(found["together"][1], skip_special_tokens=True)
        found["read"] = processor.apply_chat_template(conversations[0], add_generation_prompt=True)
    for kind in ("plain", "chat"):
        found[kind] = [(batch["input_ids"][0].tolist(), batch.get("pixel_values")) for batch in found[kind]]
    return found


def opened(item: dict) -> dict:
    return item if "text" in item else {**item, "image": PIL.Image.open(io.BytesIO(item["image"]))}


def without_padding(ids: list[int], model) -> list[int]:
    ends = model.generation_config.eos_token_id
    found = [ids.index(end) for end in (ends if isinstance(ends, list) else [ends]) if end in ids]
    return ids[: min(found)] if found else ids


def refused(processor, model) -> list[str]:
    """What is said to inputs that cannot be."""
    picture = PIL.Image.new("RGB", (8, 8))
    one = processor(text="<image>", images=picture)
    blind = copy.copy(processor)
    blind.takes_images = False
    attempts = [
        lambda: processor(text="<image> <image>", images=picture),
        lambda: blind(text="<image>", images=picture),
        lambda: model(input_ids=one["input_ids"]),
        lambda: model(input_ids=one["input_ids"][:, :1], pixel_values=one["pixel_values"]),
    ]
    said = []
    for attempt in attempts:
        try:
            attempt()
            said.append("")
        except ValueError as error:
            said.append(str(error))
    return said


def saved_again(folder: str) -> dict[str, torch.Tensor]:
    """The weights after from_pretrained and save_pretrained."""
    from safetensors.torch import load_file

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    model.save_pretrained(f"{folder}-again")
    AutoProcessor.from_pretrained(folder, trust_remote_code=True).save_pretrained(f"{folder}-again")
    AutoProcessor.from_pretrained(f"{folder}-again", trust_remote_code=True)
    return load_file(f"{folder}-again/model.safetensors")


if __name__ == "__main__":
    requests = torch.load(sys.argv[1])
    torch.save([(ask if "contents" in request else run)(request) for request in requests], sys.argv[2])
