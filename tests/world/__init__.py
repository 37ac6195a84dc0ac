"""A faulty world: ranks without processes, ports and real time. Begin with `ranks.py`.

`scheduler.py` has a virtual clock and lets one task run at a time, the next one by a seed.
`mail.py` carries messages, late, in another order, twice, or never. `ranks.py` makes of it what
ranks have of each other: an `Exchange` and a `Group`. `loading.py` lets a `Loader` run in it.
`oracle.py` has rows in a dictionary, and a log of samples; `schedule.py` a random run of training.
"""
