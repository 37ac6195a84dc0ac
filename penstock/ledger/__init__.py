"""Which lane took what of the data: what makes a run repeatable whose lanes read at their own pace.

Apart from the data plane, so that the process that keeps it for many ranks starts in no time.
"""
