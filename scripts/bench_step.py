"""A training step of transformers and of moetk, one after the other in one process.

    python scripts/bench_step.py --layers 8 --batch 4 --length 4096 --profile --out scripts/results
    python scripts/bench_step.py --contenders v5,v5-compiled,moetk-step,moetk-step-compiled
    python scripts/bench_step.py --loss-curves 5 200 --out scripts/results

The options are those of  moetk bench step --help.
"""

import sys

from moetk.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["bench", "step"]
    main()
