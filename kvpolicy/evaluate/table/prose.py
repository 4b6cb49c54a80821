"""What the page of an evaluation says around its tables; numbers come from the record."""

HEAD = """# Evaluation

Made by `kvpolicy evaluate` from [its record](../images/evaluation.json); do not edit. What can be compared within a
table was measured within one run.
"""
SETTING = """Run on {date} with kvpolicy {kvpolicy}, torch {torch}, transformers {transformers}, Python {python}, on
{processor} with {threads} threads; seed {seed}, {minutes} minutes. Model: the embedded testbed ({parameters:,}
parameters, trained on generated tasks), computed in {dtype}, so that bytes compare with those of a 16-bit cache.
{items_per_task} held-out items a task of {tokens_per_item} tokens; the shortest has {tokens_of_the_shortest_item},
question and answer included, and policies are fitted to its bytes. One small model and generated tasks: the tables
compare policies at equal bytes, and say nothing about other models.
"""
METHOD = """## How to read it

- **share**: for policies that evict, of a full cache's bytes, slack included, and all sizes of the shipped policy are
  scaled to that (`kvpolicy.evaluate.fit`); for policies with a reader (*reads*), of the entries that a decode step
  reads, while all are held; the others keep and read everything, at whatever their store takes.
- **held**: bytes of storage after the prompt, as a share of the full cache's: of the tokens seen for policies that
  evict, of as many entries for the others. These grow their storage ahead of the entries while they decode.
- **bytes an entry**: key and value of one KV head in one layer with everything kept beside them, as measured and, in
  brackets, by the formula of the plan; a full cache takes {full:g}.
- **answers**: whole answers right; in brackets, the mean share of an answer before its first mistake. The context is
  compressed first; then question and answer come token by token, so that readers choose for every one of them. {seen}
- **error**: ‖o - o*‖ / ‖o*‖ of the attention output of a head at a decode step, where o* is float64 attention of the
  same query over all keys and values of the full cache; {error_items_per_task} items a task, the newest {error_steps}
  tokens of each (fewer where question and answer are shorter), mean over heads, steps, layers and tasks; and of the
  worst layer of any task. The layers are driven one by one, so that no layer's error reaches the next.
"""
MERGE = """The same policies with each merger at its defaults, at the same bytes: a merger that keeps votes or other
state has fewer entries. Bold: more of the answers right before the first mistake, averaged over the tasks, than with
`drop`; one item is {one:.1%} of a task, so that small differences mean little.
"""
LOSSES = """In how many of these rows each merger does better or worse than `drop`; equal ones are not counted:
"""
DECODE = """One decode step of one sequence against transformers' full `DynamicCache`, both in turns in one process,
medians of {pairs} steps; {layers} layers with random weights, hidden size {hidden}, {heads} query and {kv_heads} KV
heads, {dtype}, caches filled with random numbers. Policies that evict have a budget of {percent} of the tokens, readers
read {percent} of the entries. What a compression takes is added, divided by the tokens until the next one. Below 1 is
faster. The row `full` shows what storage in place alone gives: `DynamicCache` copies all entries at every token.
"""
