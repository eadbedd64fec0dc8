"""One trace on one machine, record by record: outcomes in a file, in bounded memory, interrupted and resumed.

`opened` says where records come from, `run` has them run, `outcomes` is the file of what each returned, `checkpoints`
what a run goes on from, `shards` which records need not wait for each other, `jobs` many runs side by side.
"""
