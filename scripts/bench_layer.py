"""Mixture-of-experts layers of transformers, moetk and peers, side by side in one process.

    python scripts/bench_layer.py --tokens 256,4096,16384 --routing balanced,zipf,same --figures \
        --out scripts/results
    python scripts/bench_layer.py --tokens 256,4096 --captured --one-thread --out scripts/results

The options are those of  moetk bench layer --help.
"""

import sys

from moetk.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["bench", "layer"]
    main()
