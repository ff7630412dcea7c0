"""The method wing: a search space, what its candidates cost, the supernet over it, and what is derived from that.

It knows no runs, images, notebooks or figures. Read `supernet` first (sections 3.1 to 3.3): blocks, mixture, forward
pass, cost, sample. Below it lie, each on those before: `kernels` and `ops` (candidates), `architecture` (derived
networks), `space` (blocks and edges, section 3.1), `cost` (a price for every candidate) beside `probabilities` (the
most probable network, section 3.4), and `derivation` (networks at a cost).
"""
