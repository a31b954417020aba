"""Smith's super-convergence experiment (2017, 2018) at three sizes: cells are trained and kept, tables and plots drawn.

`sizes.py` says what is tried, `cells.py` trains one run, `study.py` goes through them and keeps what comes out,
`summary.py` and `pictures.py` read what was kept. `recipes/super_convergence.py` is its command line.
"""
