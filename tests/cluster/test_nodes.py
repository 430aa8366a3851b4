"""Two Ray nodes with a network between them: nodes that lose their power, and a link that is cut, under streams."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest

from tests.cluster.nodes import FAR, NEAR, PORT, Link, Node, has_links
from tests.cluster.test_ray import NUM_STREAMS, Cluster, until

pytestmark = pytest.mark.long


class TwoNodes(Cluster):
    """A cluster of an engine and an API process on each of two nodes."""

    def __init__(self, folder: Path, link: Link, nodes: list[Node]) -> None:
        self.link = link
        self.nodes = nodes
        super().__init__(
            folder, "--address", f"{NEAR}:{PORT}", "--host", "0.0.0.0", "--num-cpus", "1", "--ingresses", "2"
        )
        self.undisturbed = [self.stream(number) for number in range(NUM_STREAMS)]

    def whole(self) -> None:
        """Wait until there is an engine and an API process on each node."""

        def is_whole() -> bool:
            found = self.info()["cluster"]
            hosts = (
                [one["address"] for one in found["engines"] if one["is_ready"]],
                [one["url"] for one in found["servers"]],
            )
            return all(any(f"//{host}:" in one for one in some) for host in (NEAR, FAR) for some in hosts)

        until("both nodes have an engine and an API process", is_whole)
        self.url = next(one["url"] for one in self.servers() if NEAR in one["url"])
        self.wait_engines(2)


@contextmanager
def two_nodes() -> Iterator[TwoNodes]:
    """Start both nodes and the cluster, and end all of it."""
    folder = Path(tempfile.mkdtemp(prefix="shoal-"))
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        link = stack.enter_context(closing(Link()))
        nodes = [stack.enter_context(closing(Node(folder, is_head=is_head))) for is_head in (True, False)]
        yield TwoNodes(folder, link, nodes)


@pytest.fixture(scope="module")
def cluster() -> Iterator[TwoNodes]:
    if not has_links():
        pytest.skip("no network namespace can be made here: that takes root, and ip of iproute2")
    with two_nodes() as cluster:
        yield cluster


@pytest.mark.parametrize("what", ["a link that is cut", "a node that is killed"])
def test_streams_go_on_at_the_other_node_to_the_bit(cluster: TwoNodes, what: str) -> None:
    """Half of them are read from the far node, and go on at the near one."""
    cluster.whole()
    near, far = cluster.url, next(one["url"] for one in cluster.servers() if FAR in one["url"])
    with ThreadPoolExecutor(NUM_STREAMS) as pool:
        ways = [(near,) if number % 2 else (far, near) for number in range(NUM_STREAMS)]
        streams = [pool.submit(cluster.resumed, way, number) for number, way in enumerate(ways)]
        until("both work", lambda: min(one["num_unfinished"] for one in cluster.engines()) > 1)
        if what == "a link that is cut":
            cluster.link.cut()
        else:
            cluster.nodes[1].close()
        assert [stream.result() for stream in streams] == cluster.undisturbed
    cluster.link.mend()
    cluster.nodes[1].close()  # after a while without a link Ray takes it for dead, and it does not come back by itself
    cluster.nodes[1].start()
    cluster.whole()
    assert cluster.stream(0) == cluster.undisturbed[0]
