import numpy as np
import pytest

from jaxgen.decoding.topology import Topology, branches, chain, chains


def test_chains_and_trees():
    assert chain(3).parents == (0, 1, 2) and chain(0).drafts == 0
    assert chains(2, 3).parents == (0, 0, 1, 2, 3, 4)
    assert branches((2, 1, 2)).parents == (0, 0, 1, 2, 3, 3, 4, 4)
    assert chain(3).is_chain and chains(1, 2).is_chain and not chains(2, 1).is_chain


@pytest.mark.parametrize("tree", [chain(4), chains(3, 2), branches((3, 2)), Topology((0, 1, 0, 1, 4)), Topology()])
def test_ancestors_levels_and_paths_agree(tree):
    for node in range(tree.drafts + 1):
        way = [node]
        while way[-1]:
            way.append(tree.parents[way[-1] - 1])
        way = way[::-1]
        assert tree.depth[node] == len(way) - 1
        assert np.flatnonzero(tree.ancestors[node]).tolist() == sorted(way)
        assert tree.paths[node].tolist() == way + [-1] * (tree.paths.shape[1] - len(way))
        if node:
            assert node in tree.levels[len(way) - 2]
    assert sum(map(len, tree.levels)) == tree.drafts


def test_parents_come_first():
    with pytest.raises(ValueError, match="node 2 must have a parent in 0..1, not 2"):
        Topology((0, 2))
    with pytest.raises(ValueError, match="count=0"):
        chains(0, 2)
    with pytest.raises(ValueError, match=r"counts \(2, 0\)"):
        branches((2, 0))
