"""How hosts share examples."""

import grain
import pytest

from jaxgen.data.shards import one_pass, share


@pytest.mark.parametrize("hosts", [1, 2, 3])
@pytest.mark.parametrize("size", [6, 11, 12, 20])
def test_the_rows_of_all_hosts_are_the_batches_of_one(hosts, size):
    ds = one_pass(grain.MapDataset.range(size), hosts)
    whole = list(ds.batch(6))
    parts = [list(share(ds, 6, i, hosts).batch(6 // hosts)) for i in range(hosts)]
    assert [sum(rows, []) for rows in zip(*[[x.tolist() for x in part] for part in parts])] == [x.tolist() for x in whole]


def test_an_endless_stream():
    ds = grain.MapDataset.range(10).shuffle(seed=3).repeat()
    part = share(ds, 4, 1, 2)
    assert [part[i] for i in range(6)] == [ds[i] for i in (2, 3, 6, 7, 10, 11)]
    assert [x for x, _ in zip(part[2:], range(2))] == [ds[6], ds[7]]
