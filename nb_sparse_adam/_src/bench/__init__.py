# SPDX-License-Identifier: Apache-2.0
"""``nb-sparse-adam bench``: steps beside the limit that memory sets, and beside other libraries.

`cases` says what is updated, by which gradients; `contenders`, `peers` and `limits` say by whom; `timing` has
them take turns. `lines` lists every comparison with its targets, `worker` measures them in processes of their
own, `comparison` runs them all, `text` and `chart` show their figures, and `command` is all of it. The asv
suite in ``benchmarks/`` is made of the same parts. Nothing of the library imports any of it.

Lines train recommenders, too: `interaction_data` says on what, `recommenders` says who, `recommender_lines`
with which options, `recommender_search` finds these; `recommender_runs` trains them, and `curves` draws.
"""
