"""Equivalence: the pass rule, and a replaced model held against the stock one."""
