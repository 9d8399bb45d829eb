"""Train a mixture-of-experts GPT; `python pretrain_gpt.py --help` lists the flags."""

import sys
import time

STARTED = time.time()  # before the imports, so that the start-up time includes them

if __name__ == "__main__":
    from megatron import log
    from megatron.config.cli import refuse_early
    from megatron.parallel.ranks import set_rank

    try:
        set_rank()  # before errors, which only rank 0 reports at once
        refuse_early(sys.argv[1:])  # most mistakes, in a tenth of a second
    except ValueError as error:
        log.report_error(error)
        sys.exit(2)

    from megatron.exit_codes import exit_process
    from megatron.startup_signals import end_on_stop_signals

    end_on_stop_signals()  # before the import of torch, which takes seconds
    from megatron.pretrain import main

    exit_process(main(started=STARTED))
