"""Search spaces: presets, the graph, map sizes, and one sentence for everything that cannot work."""

import copy
import os
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from helpers import block_paths, edges_by_rule, make_space, refused, smallest_input, spaces
from hypothesis import given
from hypothesis import strategies as st

import densenas
from densenas import Architecture, CostTable, SearchSpace
from densenas.method.architecture import Block
from densenas.method.derivation import Lattice
from densenas.method.space import PRESETS

FOLDER = Path(densenas.__file__).parent / "spaces"
DIGITS = SearchSpace.load("digits")
WHOLE = (FOLDER / "digits.yml").read_bytes()


@pytest.mark.parametrize("name", PRESETS)
def test_preset_graph(name):
    space = SearchSpace.load(name)
    last = space.num_blocks
    assert space.name == name
    assert space.edges == edges_by_rule(space)
    assert space.edges == [(i, j) for i in range(last) for j in space.outgoing(i)]
    assert sorted(space.edges) == sorted((i, j) for j in range(last + 1) for i in space.incoming(j))
    for node in range(1, last + 1):
        assert space.incoming(node) == sorted(space.incoming(node), reverse=True) != []
    for i, j in space.edges:
        assert space.outgoing(i) == sorted(space.outgoing(i)) != []
        assert space.stride(i, j) == (1 if j == last else space.fm_sizes[i] / space.fm_sizes[j])
    assert space.maps(space.input_size) == list(space.fm_sizes)


def test_every_preset_file_is_a_preset():
    assert sorted(path.stem for path in FOLDER.glob("*.yml")) == sorted(PRESETS)


@pytest.mark.parametrize("name", ["digits", "mbv2"])
def test_preset_paths_by_brute_force(name):
    space = SearchSpace.load(name)
    assert space.count_paths() == len(block_paths(space))


def test_a_space_whose_networks_cannot_be_weighed_is_refused_before(tmp_path):
    table = CostTable.mult_adds(
        DIGITS.model_copy(update={"num_layers": (0, 40, 0, 0, 0, 0, 0)}), 32, 10
    )
    with refused(ValueError, r"num_layers and the 5 stack_ops allow 1\.61e\+24 sequences of ops"):
        Lattice(table)


@given(spaces())
def test_sequences_by_brute_force(space):
    ways = Lattice(CostTable.mult_adds(space, smallest_input(space), 2)).arcs
    stacks = [arc for arcs in ways.values() for arc in arcs if arc.to.exit]
    assert space.count_sequences() == 1 + len(stacks)


@given(spaces())
def test_random_graph_by_brute_force(space):
    assert space.edges == edges_by_rule(space)
    assert space.count_paths() == len(block_paths(space)) > 0


def test_a_path_loads_like_a_preset(tmp_path):
    path = tmp_path / "digits.yml"
    path.write_text((FOLDER / "digits.yml").read_text())
    assert SearchSpace.load(path) == SearchSpace.load(str(path)) == DIGITS


@pytest.mark.parametrize("name", ["mbv3", "spaces/nothing.yml", ""])
def test_unknown_preset(name):
    with refused(FileNotFoundError, rf"no search space '{name}'.*mbv2, resnet.*digits"):
        SearchSpace.load(name)


def changed(*keys, to):
    def edit(content):
        for key in keys[:-1]:
            content = content[key]
        if to is None:
            del content[keys[-1]]
        else:
            content[keys[-1]] = to

    return edit


def first_ops(head, stack):
    def edit(content):
        content["head_ops"], content["stack_ops"] = head, stack

    return edit


BROKEN = {
    "maps too few": (
        changed("fm_sizes", to=[16, 8, 8, 8, 4, 4]),
        r"fm_sizes has 6 entries, 7 are needed",
    ),
    "depths too many": (
        changed("num_layers", to=[0] * 8),
        r"num_layers has 8 entries, 7 are needed",
    ),
    "stage of the final node": (
        changed("stage", to=[0, 1, 1, 1, 2, 2, 2]),
        r"stage has 7 entries, 8.*final node",
    ),
    "widths too few": (
        changed("chs", to=[8, 12]),
        r"fm_sizes has 7 entries, 2 are needed for the 2 blocks of chs",
    ),
    "a single block": (
        lambda c: c.update(chs=[8], fm_sizes=[16], stage=[0, 1], num_layers=[0]),
        r"chs: .*at least 2 items",
    ),
    "no blocks": (
        lambda c: c.update(chs=[], fm_sizes=[], stage=[0], num_layers=[]),
        r"chs: .*at least 2 items",
    ),
    "width 0": (changed("chs", 3, to=0), r"chs\.3: .*greater than or equal to 1 \(got 0\)"),
    "width negative": (
        changed("chs", 6, to=-64),
        r"chs\.6: .*greater than or equal to 1 \(got -64\)",
    ),
    "map 0": (changed("fm_sizes", 6, to=0), r"fm_sizes\.6: .*greater than or equal to 1 \(got 0\)"),
    "map negative": (
        changed("fm_sizes", 5, to=-4),
        r"fm_sizes\.5: .*greater than or equal to 1 \(got -4\)",
    ),
    "map grows": (
        changed("fm_sizes", 4, to=16),
        r"block 4 has a larger map than block 3, maps cannot grow",
    ),
    "stem map": (
        changed("fm_sizes", 0, to=32),
        r"block 0 has a map of 32, the stem halves input_size = 32 to 16",
    ),
    "map quartered": (
        changed("fm_sizes", to=[16, 8, 8, 8, 2, 2, 2]),
        r"block 3 has no path to the end .*one halving of the map",
    ),
    "map not halved": (
        changed("fm_sizes", to=[16, 8, 8, 6, 4, 4, 4]),
        r"block 2 has no path to the end .*one halving",
    ),
    "stage skipped": (
        changed("stage", to=[0, 1, 1, 1, 3, 3, 3, 4]),
        r"block 3 has no path to the end .*one stage",
    ),
    "final stage skipped": (
        changed("stage", 7, to=4),
        r"block 6 has no path to the end .*one stage",
    ),
    "stage goes back": (
        changed("stage", 5, to=1),
        r"block 5 is in stage 1, before block 4; stages cannot go back",
    ),
    "final stage goes back": (
        changed("stage", 7, to=1),
        r"final node is in stage 1, before block 6; .*cannot go back",
    ),
    "depth negative": (
        changed("num_layers", 2, to=-1),
        r"num_layers\.2: .*greater than or equal to 0 \(got -1\)",
    ),
    "layers in the stem": (
        changed("num_layers", 0, to=1),
        r"block 0 is the stem.*num_layers must start with 0",
    ),
    "unknown head op": (
        changed("head_ops", 1, to="mbconv_k4_t3"),
        r"head_ops and stack_ops: unknown op 'mbconv_k4_t3', known are",
    ),
    "unknown stack op": (
        changed("stack_ops", 0, to="identity"),
        r"stack_ops: unknown op 'identity', known are",
    ),
    "op twice": (changed("stack_ops", 0, to="skip_connect"), r"stack_ops: lists an op twice"),
    "skip in head": (
        changed("head_ops", 0, to="skip_connect"),
        r"head_ops holds skip_connect.*cannot change width",
    ),
    "no head ops": (changed("head_ops", to=[]), r"head_ops: .*at least 1 item"),
    "no stack ops": (changed("stack_ops", to=[]), r"stack_ops is empty, but num_layers asks"),
    "families mixed": (
        changed("stack_ops", 0, to="basic_block"),
        r"stack_ops: MobileNetV2 and ResNet ops are mixed",
    ),
    "two ResNet blocks mixed": (
        first_ops(["basic_block"], ["bottleneck"]),
        r"basic_block and bottleneck leave different widths.*cannot be mixed",
    ),
    "ResNet stem": (
        lambda c: c.update(head_ops=["basic_block"], stack_ops=["basic_block"], init_dim=16),
        r"block 0 is 8 wide, but a ResNet stem leaves init_dim = 16",
    ),
    "no connections": (
        changed("max_connections", to=0),
        r"max_connections: .*greater than or equal to 1 \(got 0\)",
    ),
    "input size 0": (
        changed("input_size", to=0),
        r"input_size: .*greater than or equal to 1 \(got 0\)",
    ),
    "misspelled": (
        lambda c: c.update(max_conections=4),
        r"no setting 'max_conections'.*misspelled",
    ),
    "misspelled in search": (
        changed("search", "epohcs", to=4),
        r"no setting 'search\.epohcs'.*misspelled",
    ),
    "misspelled in retrain": (
        changed("retrain", "warmup", to=4),
        r"no setting 'retrain\.warmup'.*misspelled",
    ),
    "chs missing": (changed("chs", to=None), r"setting 'chs' is missing"),
    "search missing": (changed("search", to=None), r"setting 'search' is missing"),
    "epochs missing": (
        changed("search", "epochs", to=None),
        r"setting 'search\.epochs' is missing",
    ),
    "epochs 0": (
        changed("search", "epochs", to=0),
        r"search\.epochs: .*greater than or equal to 1 \(got 0\)",
    ),
    "learning rate as text": (
        changed("retrain", "lr", to="fast"),
        r"retrain\.lr: .*valid number.*\(got 'fast'\)",
    ),
    "chs as text": (changed("chs", to="wide"), r"chs: .*\(got 'wide'\)"),
    "a width as text": (changed("chs", 2, to="wide"), r"chs\.2: .*valid integer.*\(got 'wide'\)"),
    "a width as a fraction": (
        changed("chs", 2, to=12.5),
        r"chs\.2: .*valid integer.*\(got 12\.5\)",
    ),
    "last_dim as a list": (
        changed("last_dim", to=[128]),
        r"last_dim: .*valid integer.*\(got \[128\]\)",
    ),
    "search as a list": (changed("search", to=[1]), r"search: .*valid dictionary.*\(got \[1\]\)"),
    "a number as a setting": (changed(7, to="seven"), r"setting.*\b7\b|\b7\b.*setting"),
    "epochs true": (
        changed("search", "epochs", to=True),
        r"search\.epochs: .*valid integer \(got True\)",
    ),
    "epochs as text": (
        changed("search", "epochs", to="16"),
        r"search\.epochs: .*valid integer \(got '16'\)",
    ),
    "epochs for ever": (
        changed("search", "epochs", to=10**9),
        r"search\.epochs: .*less than or equal to 100000",
    ),
    "lr true": (changed("retrain", "lr", to=True), r"retrain\.lr: .*valid number \(got True\)"),
    "lr infinite": (
        changed("search", "lr", to=float("inf")),
        r"search\.lr: .*finite number \(got inf\)",
    ),
    "lr nan": (
        changed("retrain", "lr", to=float("nan")),
        r"retrain\.lr: .*finite number \(got nan\)",
    ),
    "lr huge": (changed("retrain", "lr", to=10**400), r"retrain\.lr: .*number \(got 1000.* …\)$"),
    "lr a negative zero": (
        changed("retrain", "lr", to=-0.0),
        r"retrain\.lr: .*greater than 0 \(got -0\.0\)",
    ),
    "weight decay nan": (
        changed("search", "weight_decay", to=float("nan")),
        r"search\.weight_decay: .*finite",
    ),
    "log base infinite": (
        changed("search", "log_base", to=float("inf")),
        r"search\.log_base: .*finite",
    ),
    "temperature nan": (
        changed("search", "softmax_temp", to=float("nan")),
        r"search\.softmax_temp: .*finite",
    ),
    "betas": (
        changed("search", "arch_betas", to=[2, 3]),
        r"search\.arch_betas\.0: .*less than 1 \(got 2\)",
    ),
    "one beta": (changed("search", "arch_betas", to=[0.5]), r"search\.arch_betas"),
    "lr_min above lr": (
        changed("search", "lr_min", to=0.3),
        r"search: lr_min is 0\.3, more than lr = 0\.1, from where the rate falls$",
    ),
    "retrain's lr_min above lr": (
        changed("retrain", "lr_min", to=0.2),
        r"retrain: lr_min is 0\.2, more than lr = 0\.1",
    ),
    "width of millions": (changed("chs", 2, to=10**12), r"chs\.2: .*less than or equal to 65536"),
    "input of millions": (
        changed("input_size", to=10**9),
        r"input_size: .*less than or equal to 8192",
    ),
    "a width true": (changed("chs", 2, to=True), r"chs\.2: .*valid integer"),
    "maps as fractions": (
        changed("fm_sizes", 0, to=16.0),
        r"fm_sizes\.0: .*valid integer \(got 16\.0\)",
    ),
    "40 layers": (
        changed("num_layers", 3, to=40),
        r"5 stack_ops allow 1\.61e\+24 sequences of ops, at most 200,000",
    ),
    "layers without end": (
        changed("num_layers", 3, to=10**9),
        r"num_layers\.3: .*less than or equal to 64",
    ),
    "1,000 blocks": (changed("chs", to=[8] * 1000), r"chs: .*at most 128 items"),
    "a name of two lines": (changed("name", to="a\nb"), r"name: "),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_space(name, tmp_path):
    edit, pattern = BROKEN[name]
    content = copy.deepcopy(yaml.safe_load((FOLDER / "digits.yml").read_text()))
    edit(content)
    path = tmp_path / "broken.yml"
    path.write_text(yaml.safe_dump(content))
    with refused(ValueError, rf"broken\.yml.*{pattern}"):
        SearchSpace.load(path)


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        (b"chs: [8, 12\nfm_sizes: 4", "not valid YAML"),
        (b"chs:\n\t- 8", "not valid YAML"),
        (b"[8, 12, 16]", "expected a mapping of settings, found list"),
        (b"digits", "expected a mapping of settings, found str"),
        (b"", "expected a mapping of settings, found NoneType"),
        (b"!!python/object/apply:os.getcwd []", "not valid YAML"),
        (b"\x89PNG\r\n\x1a\n\x00\xff", "not valid YAML|not UTF-8|not a? ?text"),
        (b"chs: [8]\nretrain:\n  lr: 0.1\n  lr: 0.2\n", "line 4: the setting 'lr' is there twice"),
        (
            b"a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n",
            "line 1: anchors and aliases .* are not read",
        ),
        (b"a: *a\n", "line 1: anchors and aliases"),
        (b"[" * 100_000, "nested more than 10 deep"),
        (b"- " * 100_000, "nested more than 10 deep"),
        (b"input_size: " + b"9" * 5000, "not valid YAML: Exceeds the limit"),
        (b"input_size: 0x" + b"f" * 5000, "input_size: .*a number of thousands of digits"),
        (b"input_size: 040", "line 1: 040 would be read as octal"),
        (b"input_size: 1:30", "line 1: 1:30 would be read as octal or sexagesimal"),
        (b"input_size: 1e400", "input_size: .*valid integer"),
        (
            WHOLE.replace(b"eps: 0.001", b"eps: 1e-3"),
            r"bn_eps: .*YAML takes 1e-4 .* for text, write 1\.0e-4 .*\(got '1e-3'\)",
        ),
        (
            WHOLE.replace(b"eps: 0.001", b"eps: 1.0e3"),
            r"bn_eps: .*for text, write .* 1\.0e\+4 \(got '1\.0e3'\)",
        ),
        (WHOLE.replace(b"eps: 0.001", b"eps: 1.0e+400"), r"bn_eps: .*finite number \(got inf\)"),
        (b"input_size: 2024-13-01", "not valid YAML: month"),
        (b"input_size: !!int x", "line 1: the tag .* is not read"),
        (b"#" * (1 << 19), "larger than 256 KiB, more than settings need"),
        (b"#" * (1 << 25), "larger than 16 MiB"),
    ],
    ids=[
        "bracket left open",
        "tab",
        "list",
        "word",
        "empty",
        "code",
        "binary",
        "twice",
        "bomb",
        "alias",
        "deep",
        "deep block",
        "digits",
        "hexadecimal",
        "octal",
        "sexagesimal",
        "exponent",
        "exponent as text",
        "exponent without sign",
        "infinite",
        "date",
        "tag",
        "half a megabyte",
        "many megabytes",
    ],
)
def test_broken_file(text, pattern, tmp_path):
    path = tmp_path / "broken.yml"
    path.write_bytes(text)
    with refused(ValueError, rf"broken\.yml.*({pattern})"):
        SearchSpace.load(path)


def test_a_file_that_would_be_waited_for_is_none(tmp_path):
    os.mkfifo(tmp_path / "space.yml")
    for path in (tmp_path / "space.yml", tmp_path, "x" * 5000):
        with refused(FileNotFoundError, "no search space"):
            SearchSpace.load(path)


def test_a_space_of_one_width_finds_its_architecture_among_millions_of_paths():
    space = make_space(
        init_dim=8,
        chs=[8] * 40,
        fm_sizes=[16] * 40,
        stage=[0] * 41,
        num_layers=[0] * 40,
        max_connections=10,
        head_ops=["mbconv_k3_t3"],
        stack_ops=[],
    )
    arch = space.architecture((*range(19), 25, 35, 40), [("mbconv_k3_t3", ())] * 20)
    assert space.path_of(arch) == (*range(19), 20, 30, 40)  # the first of them


def test_the_space_of_the_broken_ones_works_unbroken(tmp_path):
    path = tmp_path / "sound.yml"
    path.write_text(yaml.safe_dump(yaml.safe_load((FOLDER / "digits.yml").read_text())))
    assert SearchSpace.load(path).edges == DIGITS.edges


@pytest.mark.parametrize(("size", "block"), [(1, 1), (2, 1), (3, 4), (4, 4), (0, 1), (-5, 1)])
def test_input_too_small(size, block):
    with refused(
        ValueError, rf"digits: block {block} would shrink a map below 1 at input size {size}$"
    ):
        DIGITS.maps(size)


@pytest.mark.parametrize("size", [10**9, 32.0, float("nan"), "32"])
def test_input_that_is_no_image(size):
    with refused(ValueError, r"input size is .*, expected whole pixels, at most 8192"):
        DIGITS.maps(size)


@given(spaces())
def test_smallest_input_that_every_halving_can_take(space):
    assert space.maps(smallest_input(space))[-1] == 1
    if len(set(space.fm_sizes)) > 1:
        with refused(ValueError, r"block \d would shrink a map below 1"):
            space.maps(smallest_input(space) // 2)


@given(st.integers(5, 240) | st.sampled_from([33, 225]), st.sampled_from(block_paths(DIGITS)))
def test_maps_are_those_of_a_network(size, path):
    stem = Block(DIGITS.init_dim, DIGITS.chs[0], "mbconv_k3_t1", (), 1)
    blocks = [
        Block(DIGITS.chs[i], DIGITS.chs[j], "mbconv_k5_t3", ("mbconv_k3_t3",), DIGITS.stride(i, j))
        for i, j in pairwise(path[:-1])
    ]
    arch = Architecture((stem, *blocks), DIGITS.last_dim)
    seen = []
    with torch.device("meta"):
        net = arch.build(10)
        for module in [net.input_block, *net.blocks[1:]]:
            module.register_forward_hook(lambda _, __, out: seen.append(tuple(out.shape[2:])))
        net(torch.empty(2, 3, size, size))
    maps = DIGITS.maps(size)
    assert seen == [(maps[block], maps[block]) for block in path[:-1]]
