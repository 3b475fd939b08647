"""Checkpoints: complete or invisible folders with a checksum of each file, named by an atomic pointer (store.py).

| in `checkpoints/step_*/` | what it holds | written by | read by |
| --- | --- | --- | --- |
| `manifest.json` | step, configuration, layout, every other file's digest | store.py | store.py |
| `manifest.sha256` | the digest of the manifest | store.py | store.py |
| `dense/model-I-of-N` | dense weights of model-parallel rank I of N | dense.py | dense.py, optimizer_state.py |
| `engine/` | DeepSpeed's files: each rank's weights, masters, moments | DeepSpeed | DeepSpeed, deepspeed_state.py |
| `dense/optimizer-S` | masters and moments of pipeline stage S, whole | optimizer_state.py | optimizer_state.py |
| `tables/rows-A-B` | rows A to B - 1, and their optimizer's state | tables.py | tables.py, rows_on_disk.py |
| `tables/changed-K-A-B` | those of them that changed before incremental save K | tables.py | tables.py |

The names of safetensors files go on with `.safetensors`. The first rank writes the manifest, one of the ranks that hold the
same weights writes `dense/model-*`, all ranks write their part of `engine/`, and each rank writes the rows that it owns.
Inference, export and new runs read `dense/model-*`, not `engine/`. DeepSpeed reads `engine/` in a run of the layout that wrote
it; in a run of any other layout deepspeed_state.py does. `dense/optimizer-*` replaces `engine/` in a checkpoint that `overtok
checkpoint reshape` wrote; one of weights only (import, grow: weights_only.py) has neither.

How one rank reads what four ranks wrote, pipeline 2 x tensor 2: the layout in the manifest says that there are four files
`dense/model-*`. Each weight of a pipeline stage lies in two of them; their metadata has the dimension along which to join the
shards. Masters and moments are found in `engine/` by parameter name: the flat parts of ZeRO's ranks are joined to the
parameters of each model-parallel rank (deepspeed_state.py), and those along the same dimensions as the weights
(optimizer_state.py). The rank owns all rows and fills them from all table files, the names of which say which rows they hold.
With more ranks each reads the parts that it owns.
"""
