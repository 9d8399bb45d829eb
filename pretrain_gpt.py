"""Train a mixture-of-experts GPT: `deepspeed pretrain_gpt.py --help`."""

from megatron.pretrain import main

if __name__ == "__main__":
    raise SystemExit(main())
