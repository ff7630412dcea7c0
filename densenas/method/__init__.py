"""The method wing: a search space, what its candidates cost, the supernet over it, and what is derived from that.

It knows no runs, images, notebooks or figures. Read in this order: `space` (blocks and edges, section 3.1),
`ops` and `kernels` (candidates), `architecture` (derived networks), `cost` (a price for every candidate), `supernet`
(sections 3.1 to 3.3), `probabilities` (what a search has reached) and `derivation` (section 3.4).
"""
