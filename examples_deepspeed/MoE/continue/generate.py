"""Generates text with transformers alone: what users of an exported model do.

python examples_deepspeed/MoE/continue/generate.py runs/x/hf --prompt "Once upon a time"
"""

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    """Load the model and print a greedy continuation of the prompt."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="folder of a Hugging Face model")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
    inputs = tokenizer(args.prompt, return_tensors="pt", return_token_type_ids=False)
    output = model.generate(**inputs, max_new_tokens=args.max_new_tokens, do_sample=False)
    print(tokenizer.decode(output[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
