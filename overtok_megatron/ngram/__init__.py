"""N-gram input embeddings: token ids to table rows, the sharded tables, their exchange and their optimizer.

A row is named in four ways, in the order in which a look-up meets them:

    name                           made by                                         and back by
    table, and row in the table    the hash of the n-gram (ids.py)                 -
    row id, in the row space       kernels.rows.row_id                             kernels.rows.table_and_row_of
    owner rank, and local row      placement.owned_range: the range of the rank    local row + first row id of the rank
                                   holds the row id; local row = row id - its
                                   first row id (FlatExchange.plan)
    slot, in the fetched rows      RowKernels.unique, from the row id: its index   DistinctIds.ids[slot] is the row id
    of a step                      among the distinct ones that this rank wants

The row space is the one array of all rows of all tables (row_space.py). `NgramHash.row_ids` takes the first two steps at once,
so the number of a row in its table appears only where tables grow and in tests. A look-up is one (position, table).

A training step, with the file of each part; A micro-batches, b sequences, s positions, T tables, U distinct rows, w row width:

    tokens [A, b, s], on the host
      | ShardedTables.announce               sharded_tables.py                    one step before the step begins
      |   ON A THREAD (prefetch.py, worker.py), over process groups of its own, while the step before computes:
      |   NgramHash.row_ids                  ids.py                               row ids [A, b, s, T]
      |   Exchange.plan                      exchange.py, two_level_exchange.py   each row once; its owner learns who wants it,
      |                                                                           and both ends plan the gradients' way back
      |   Exchange.start_fetch               only for rows on the host            owners read (row_store.py) and send
      |   Exchange.tell_changes              only for rows on the host            which of them the step before will update
      |   Upload                             uploading.py                         the plan, and rows on the host, to the device
    Plan
      |   Exchange.start_fetch               only for rows on the device          on the main thread, when the step before has
      |                                                                           updated its rows: one all-to-all
      | ShardedTables.fetch_rows             sharded_tables.py                    at the start of the step: waits for the rows
    FetchedRows: slots [A, b, s, T], and DistinctRows [U, w]                      fetched_rows.py
      | for each micro-batch:
      |   FetchedRows.gather                 fetched_rows.py                      rows[slots], without communication
      |   NgramProjection                    projection.py                        w -> hidden size, joined to the embedding
      |   ... the model, the loss, backward ...
      |   DistinctRows.add_gradients         fetched_rows.py                      into one buffer [U, w]
      | ShardedTables.reduce_gradients       sharded_tables.py                    called inside DeepSpeed's gradient norm
      |   Exchange.send_gradients            exchange.py, two_level_exchange.py   owners add what several ranks send
    RowGradients: local rows, gradients, the tables' part of the global norm
      | ShardedTables.update_rows            sharded_tables.py
      |   RowOptimizer.update                row_optimizer.py                     the rows of the step, in place
      |   Exchange.fetch_changed             only for rows on the host            those that the next step has fetched already
    the updated rows, at their owners

Rows on the host are updated on the thread as well: whoever reads rows, or their optimizer's state, calls `settle` before. A
step that was not announced, and an evaluation, go through the thread too, while the main thread waits. One rank on the CPU with
`storage: device` has no thread, and tables that are only read (TableReader) plan where the model computes.

building.py makes all of this from a configuration; families.py says what a second way of hashing has to offer; snapshot.py
keeps rows as they were while a save reads them.

The contracts that these files, and others, cite by number:

C1  Same numbers. Row ids depend on the tokens, the tokens before them and the document boundaries alone: not on the split into
    micro-batches, on ranks or slices of the sequence, on padding to the left, or on how many tokens are decoded per call.
C2  One row space. The rows of all tables are interleaved in one array, and every rank owns one contiguous range of it, without
    padding rows. The initial values of a row follow from the seed and its row id, so they are the same for any number of ranks.
C3  One exchange per step. Which rows a step needs follows from its tokens alone, and is planned before the step begins. The
    rows of all micro-batches are fetched together before the first forward pass, and their gradients are sent together after
    the last backward pass; nothing communicates about the rows of this step in between. For rows on the device, the main thread
    takes part in one all-to-all as soon as the step before has updated its rows and in one after the last backward pass (two
    and two in two levels), and waits for the device in neither. The cost of a step depends on its look-ups: it allocates,
    moves and reads nothing of the size of the tables.
C4  Tables on every rank. All ranks of the world may own rows, and serve them, also pipeline stages that look nothing up. Ranks
    that see the same sequence each look up a slice of it; tables are never replicated.
C5  One norm. Gradient clipping uses one norm over dense parameters and rows, the one that a single process would compute.
"""
