"""Ablations that survive a kill: arms x seeds from a TOML file, one process a cell, one report."""

from moetk.sweep.config import Config, load_config, parse_config
from moetk.sweep.export import write_csv, write_parquet
from moetk.sweep.report import load_summary, write_figures, write_report
from moetk.sweep.runner import run_sweep
from moetk.sweep.store import read_sweep

__all__ = [
    "Config",
    "load_config",
    "load_summary",
    "parse_config",
    "read_sweep",
    "run_sweep",
    "write_csv",
    "write_figures",
    "write_parquet",
    "write_report",
]
