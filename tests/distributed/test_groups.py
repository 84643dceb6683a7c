"""Which process groups a graph names; one process that pretends to be one of eight ranks."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from omni_cache.passes import RegionError
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from omni_cache.capture.ranks import groups_of_body, groups_of_module
from omni_cache.options import CompileOptions


@pytest.fixture(scope="module", autouse=True)
def _eight_ranks():
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def mesh():
    return init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("data", "ring", "heads"))


def groups(function, *inputs, given=None):
    graphs = []

    def keep(gm, example_inputs):
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(function, backend=keep, fullgraph=True)(*inputs)
    return groups_of_body([n for n in graphs[0].graph.nodes if n.op != "placeholder"], given)


def ranks_of(found):
    return [dist.get_process_group_ranks(each) for each in found]


def gathered(x, group):
    return collectives.all_gather_tensor(x, 0, group)


def test_what_communicates_with_nobody_names_no_group():
    assert groups(lambda x: x + 1, torch.ones(4)) == ()


def test_a_collective_names_its_group(mesh):
    assert ranks_of(groups(lambda x: gathered(x, mesh["ring"]), torch.ones(4))) == [[0, 2]]


def test_a_collective_of_torch_distributed_names_its_group(mesh):
    group = mesh.get_group("heads")

    def reduced(x):
        x = x + 1
        dist.all_reduce(x, group=group)
        return x

    assert ranks_of(groups(reduced, torch.ones(4))) == [[0, 1]]


def test_a_group_of_one_rank_names_nobody():
    alone = dist.new_group([0])
    assert groups(lambda x: gathered(x, alone), torch.ones(4)) == ()


def test_a_group_within_another_has_agreed_with_it(mesh):
    def both(x):
        return gathered(gathered(x, mesh["ring"]), dist.group.WORLD)

    assert ranks_of(groups(both, torch.ones(4))) == [list(range(8))]


def test_a_mesh_of_weights_names_its_dimensions_and_no_others(mesh):
    weight = distribute_tensor(torch.ones(4, 4), mesh["ring", "heads"], [Shard(0), Shard(1)])
    inputs = torch.ones(4, 4)

    def product(x, weight):
        whole = DTensor.from_local(x, weight.device_mesh, [Replicate(), Replicate()])
        return (whole + weight).to_local()

    assert ranks_of(groups(product, inputs, weight)) == [[0, 2], [0, 1]]


def test_dimensions_of_one_mesh_are_agreed_over_in_the_order_of_the_mesh(mesh):
    weight = distribute_tensor(torch.ones(4), mesh["ring"], [Shard(0)])

    def both(x, weight):
        return gathered(x, mesh["heads"]), weight + 1

    assert ranks_of(groups(both, torch.ones(4), weight)) == [[0, 2], [0, 1]]


def test_a_group_and_another_of_the_same_ranks_agree_once():
    one, other = dist.new_group([0, 5]), dist.new_group([0, 5])

    def both(x):
        return gathered(gathered(x, one), other)

    assert ranks_of(groups(both, torch.ones(4))) == [[0, 5]]


def test_a_mesh_puts_no_groups_together_that_are_not_its_dimensions(mesh):
    weight = distribute_tensor(torch.ones(4), mesh["ring"], [Shard(0)])
    other = dist.new_group([0, 3])

    def both(x, weight):
        return gathered(x, other), weight + 1

    with pytest.raises(RegionError, match=r"several process groups, of ranks .*process_group="):
        groups(both, torch.ones(4), weight)


def test_groups_that_no_mesh_puts_together_are_refused_with_the_flag_to_set():
    one, other = dist.new_group([0, 1]), dist.new_group([0, 3])

    def both(x):
        return gathered(gathered(x, one), other)

    with pytest.raises(RegionError, match=r"\[0, 1\] and \[0, 3\].*process_group="):
        groups(both, torch.ones(4))
    assert groups(both, torch.ones(4), given=one) == (one,)


def test_a_group_that_only_another_library_knows_is_refused():
    with torch.library._scoped_library("ranks_of_a_test", "FRAGMENT") as library:
        library.define("reduce(Tensor x, str group_name) -> Tensor")
        library.impl("reduce", lambda x, group_name: x.clone(), "CompositeExplicitAutograd")
        library.impl("reduce", lambda x, group_name: torch.empty_like(x), "Meta")
        with pytest.raises(RegionError, match=r"no process group for.*process_group="):
            groups(lambda x: torch.ops.ranks_of_a_test.reduce(x, "tp:0"), torch.ones(4))


def test_a_module_names_the_meshes_of_its_weights(mesh):
    module = torch.nn.Linear(4, 4)
    assert groups_of_module(module) == ()
    weight = distribute_tensor(module.weight, mesh["heads"], [Shard(0)])
    module.weight = torch.nn.Parameter(weight)
    assert ranks_of(groups_of_module(module)) == [[0, 1]]


def test_a_module_names_the_group_that_shards_it(mesh):
    """As FullyShardedDataParallel keeps it, wherever in the module that lies."""
    module = torch.nn.Sequential(torch.nn.Linear(4, 4))
    module[0].process_group = mesh.get_group("ring")
    assert ranks_of(groups_of_module(module)) == [[0, 2]]
    assert groups_of_module(module, mesh.get_group("heads")) == (mesh.get_group("heads"),)


def test_a_collective_within_an_inner_graph_names_its_group(mesh):
    name = mesh.get_group("ring").group_name

    def summed(x):
        collective = torch.ops._c10d_functional
        return collective.wait_tensor(collective.all_reduce(x, "sum", name))

    def one_of_two(x):
        return torch.cond(x.sum() > 0, summed, torch.neg, (x,))

    assert ranks_of(groups(one_of_two, torch.ones(4))) == [[0, 2]]


def test_weights_on_two_dimensions_of_one_mesh_are_put_together_by_it(mesh):
    module = torch.nn.ParameterList(
        distribute_tensor(torch.ones(4), mesh[name], [Shard(0)]) for name in ("heads", "ring")
    )
    assert ranks_of(groups_of_module(module)) == [[0, 2], [0, 1]]


def test_what_enters_the_body_as_a_part_names_its_mesh(mesh):
    weight = distribute_tensor(torch.ones(4), mesh["ring"], [Shard(0)])
    assert ranks_of(groups(lambda weight: weight.to_local() + 1, weight)) == [[0, 2]]


@pytest.mark.parametrize("name", ["group_name", "group", "process_group"])
@pytest.mark.parametrize("by_name", [False, True], ids=["by position", "by name"])
def test_an_operator_of_ones_own_names_its_group(mesh, name, by_name):
    with torch.library._scoped_library("names_of_a_test", "FRAGMENT") as library:
        library.define(f"sum_{name}(Tensor x, str {name}) -> Tensor")
        library.impl(f"sum_{name}", lambda x, group: x.clone(), "CompositeExplicitAutograd")
        operator = getattr(torch.ops.names_of_a_test, f"sum_{name}")
        graph = torch.fx.Graph()
        given = mesh.get_group("ring").group_name
        x = graph.placeholder("x")
        node = graph.call_function(
            operator.default, (x,) if by_name else (x, given), {name: given} if by_name else {}
        )
        assert ranks_of(groups_of_body([node])) == [[0, 2]]


def test_the_flag_takes_a_group_or_a_mesh_with_one_dimension(mesh):
    ring = mesh.get_group("ring")
    for given in (ring, mesh["ring"]):
        assert CompileOptions.parse({"process_group": given}).process_group is ring
    assert CompileOptions.parse().process_group is None
    for given in (mesh, "ring", dist.GroupMember.NON_GROUP_MEMBER):
        with pytest.raises(ValueError, match=r"process_group=.* is not allowed; .* must be a Proc"):
            CompileOptions.parse({"process_group": given})
