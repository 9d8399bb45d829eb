"""Train a mixture-of-experts GPT: `deepspeed pretrain_gpt.py --help`."""

from megatron.pretrain import leave, main

if __name__ == "__main__":
    leave(main())
