"""The method wing: a search space, what its candidates cost, the supernet over it, and what is derived from that.

It knows no runs, images, notebooks or figures. Read `supernet` first (sections 3.1 to 3.3): blocks, mixture, forward
pass, cost, sample, derivation. Below it lie, each on those before: `ops` (candidates), `architecture` (derived
networks), `space` (blocks and edges, section 3.1), `cost` (a price for every candidate) beside `probabilities` (what a
search has reached), and `derivation` (section 3.4).
"""
