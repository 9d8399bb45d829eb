"""Train a mixture-of-experts GPT; `python pretrain_gpt.py --help` lists the flags."""

import time

STARTED = time.time()  # before the imports, so that the start-up time includes them

if __name__ == "__main__":
    from megatron.exit_codes import exit_process
    from megatron.startup_signals import end_on_stop_signals

    end_on_stop_signals()  # before the import of torch, which takes seconds
    from megatron.pretrain import main

    exit_process(main(started=STARTED))
