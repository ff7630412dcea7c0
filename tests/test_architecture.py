"""Derived networks: the net_config text, what is refused in it, and published model folders."""

import os
from itertools import pairwise

import pytest
import torch
from helpers import MBCONVS, TINY, refused
from hypothesis import given
from hypothesis import strategies as st

from densenas import Architecture, load_published
from densenas.identity import PUBLISHED
from densenas.method.architecture import Block
from densenas.networks import save_network


@st.composite
def architectures(draw):
    family = draw(st.sampled_from(["mbv2", "basic_block", "bottleneck"]))
    ops = st.sampled_from(MBCONVS if family == "mbv2" else [family])
    widths = draw(st.lists(st.integers(1, 10), min_size=2, max_size=6))
    blocks = [
        Block(
            before,
            after,
            draw(ops),
            tuple(draw(st.lists(ops, max_size=3))),
            draw(st.sampled_from([1, 2])),
        )
        for before, after in pairwise(widths)
    ]
    return Architecture(tuple(blocks), draw(st.integers(1, 99)) if family == "mbv2" else None)


@given(architectures())
def test_text_and_architecture_are_the_same_thing(arch):
    text = str(arch)
    assert Architecture.parse(text) == arch
    assert str(Architecture.parse(text)) == text
    assert str(Architecture.parse(f"\n {text.replace('|', ' | ').replace(',', ' ,')} \n")) == text


def test_text_is_the_published_one():
    blocks = (
        Block(16, 16, "mbconv_k3_t1", (), 1),
        Block(16, 24, "mbconv_k5_t3", ("mbconv_k3_t6",), 2),
    )
    assert str(Architecture(blocks, 1984)).split("|") == [
        "[[16, 16], 'mbconv_k3_t1', [], 0, 1]",
        "[[16, 24], 'mbconv_k5_t3', ['mbconv_k3_t6'], 1, 2]",
        "[[24, 1984], 'conv1_1']",
    ]


def test_named_architectures_carry_the_published_figures():
    for name in PUBLISHED:
        arch = Architecture.named(name)
        assert arch.published["name"] == name
        assert str(arch) == arch.published["net_config"]
        assert arch == Architecture.parse(str(arch))


@pytest.mark.parametrize(
    ("name", "mult_adds", "params", "figures"),
    [
        ("DenseNAS-A (arXiv v1)", 501.390016, 7.890752, (24.3, 75.9, 92.6)),
        ("DenseNAS-B (arXiv v1)", 413.7592, 6.877344, (21.1, 74.7, 92.0)),
    ],
)
def test_the_first_arxiv_version_has_networks_of_its_own(name, mult_adds, params, figures):
    arch = Architecture.named(name)
    assert arch != Architecture.named(name.removesuffix(" (arXiv v1)"))
    assert (arch.mult_adds(224), arch.params()) == pytest.approx((mult_adds, params), abs=1e-9)
    assert tuple(arch.published[entry] for entry in ("titanxp_ms", "top1", "top5")) == figures


def test_unknown_name_lists_the_known_ones():
    with refused(
        KeyError, r"no published layer list for 'DenseNAS-Z'.*DenseNAS-A, DenseNAS-B, DenseNAS-C"
    ):
        Architecture.named("DenseNAS-Z")


@given(architectures(), st.sampled_from([16, 33]))
def test_networks_run_on_any_size(arch, size):
    with torch.device("meta"):
        assert arch.build(4)(torch.empty(2, 3, size, size)).shape == (2, 4)


FIRST = "[[8, 8], 'mbconv_k3_t1', [], 0, 1]"
LAST = "[[8, 99], 'conv1_1']"
RES = "[[8, 12], 'basic_block', ['basic_block'], 1, 2]"


def second(text):
    return f"{FIRST}|{text}|{LAST}"


MALFORMED = {
    "empty": ("", r"block 0 .*literal"),
    "words": ("DenseNAS", r"block 0 .*literal"),
    "words on two lines": ("Dense\nNAS", r"block 0 .*literal"),
    "block is a word": (second("mbconv_k3_t3"), r"block 1 .*literal"),
    "last block is a word": (f"{FIRST}|conv1_1", r"block 1 .*literal"),
    "trailing bar": (f"{FIRST}|", r"block 1 .*literal"),
    "bracket missing": (second("[[8, 8], 'mbconv_k3_t3', [], 0, 1"), r"block 1 .*literal"),
    "a list as a key": (second("{[]: 8}"), r"block 1 "),
    "nested too deep": (second("[" * 100_000), r"block 1 .*literal"),
    "a number": (second("8"), r"block 1 .*expected \[\[in, out\]"),
    "stride missing": (
        second("[[8, 8], 'mbconv_k3_t3', [], 0]"),
        r"block 1 .*expected \[\[in, out\]",
    ),
    "on two lines": (
        second("[[8, 8],\n'mbconv_k3_t3', [], 0]"),
        r"block 1 .*expected \[\[in, out\]",
    ),
    "one width": (second("[[8], 'mbconv_k3_t3', [], 0, 1]"), r"block 1 .*expected \[\[in, out\]"),
    "width as text": (
        second("[['8', 8], 'mbconv_k3_t3', [], 0, 1]"),
        r"block 1 .*expected \[\[in, out\]",
    ),
    "width as a fraction": (
        second("[[8.0, 8], 'mbconv_k3_t3', [], 0, 1]"),
        r"block 1 .*expected \[\[in, out\]",
    ),
    "width as a truth": (
        f"[[8, True], 'mbconv_k3_t3', [], 0, 1]|{LAST}",
        r"block 0 .*expected \[\[in, out\]",
    ),
    "head op as a number": (second("[[8, 8], 3, [], 0, 1]"), r"block 1 .*expected \[\[in, out\]"),
    "stack op as a number": (
        second("[[8, 8], 'mbconv_k3_t3', [3], 1, 1]"),
        r"block 1 .*(expected|op)",
    ),
    "stack op as a list": (
        second("[[8, 8], 'mbconv_k3_t3', [[]], 1, 1]"),
        r"block 1 .*(expected|op)",
    ),
    "stack as text": (
        second("[[8, 8], 'mbconv_k3_t3', 'mbconv_k3_t3', 12, 1]"),
        r"block 1 .*expected \[\[in, out\]",
    ),
    "width 0": (
        f"[[8, 0], 'mbconv_k3_t3', [], 0, 1]|{LAST}",
        r"block 0 .*widths 8 and 0.*positive",
    ),
    "width negative": (
        f"[[-8, 8], 'mbconv_k3_t3', [], 0, 1]|{LAST}",
        r"block 0 .*widths -8 and 8.*positive",
    ),
    "width with zeros too many": (
        f"[[8, {10**12}], 'mbconv_k3_t1', [], 0, 1]|{LAST}",
        r"block 0 has widths 8 and 1000000000000, widths are at most 100,000",
    ),
    "conv1_1 to a million millions": (
        f"{FIRST}|[[8, {10**12}], 'conv1_1']",
        r"conv1_1 leaves .*at most 100,000",
    ),
    "conv1_1 as a truth": (
        "[[1, 1], 'mbconv_k3_t1', [], 0, 1]|[[True, True], 'conv1_1']",
        r"block 1 .*expected \[\[",
    ),
    "ten thousand blocks": (
        "|".join([FIRST] * 10_000) + f"|{LAST}",
        r"has 10,001 blocks, at most 500",
    ),
    "a hundred thousand layers": (
        f"[[8, 8], 'mbconv_k3_t1', {['mbconv_k3_t1'] * 100_000}, 100000, 1]|{LAST}",
        r"has 100,001 layers, at most 500",
    ),
    "stride 3": (
        second("[[8, 8], 'mbconv_k3_t3', [], 0, 3]"),
        r"block 1 .*stride 3, strides are 1 or 2",
    ),
    "stride 0": (
        second("[[8, 8], 'mbconv_k3_t3', [], 0, 0]"),
        r"block 1 .*stride 0, strides are 1 or 2",
    ),
    "wrong count": (
        second("[[8, 8], 'mbconv_k3_t3', [], 2, 1]"),
        r"block 1 .*announces 2 stacked ops, but lists 0",
    ),
    "unknown head op": (
        second("[[8, 8], 'mbconv_k4_t3', [], 0, 1]"),
        r"block 1 .*unknown op 'mbconv_k4_t3', known",
    ),
    "unknown stack op": (
        second("[[8, 8], 'mbconv_k3_t3', ['conv'], 1, 1]"),
        r"block 1 .*unknown op 'conv', known are",
    ),
    "op with a line break": (second(r"[[8, 8], 'mbconv\nk3', [], 0, 1]"), r"block 1 .*unknown op"),
    "skip as head": (
        second("[[8, 8], 'skip_connect', [], 0, 1]"),
        r"block 1 .*skip_connect.*derived network drops",
    ),
    "skip in the stack": (
        second("[[8, 8], 'mbconv_k3_t3', ['skip_connect'], 1, 1]"),
        r"block 1 .*skip_connect.*derived network drops",
    ),
    "conv1_1 in the middle": (f"{FIRST}|{LAST}|{LAST}", r"block 1 .*expected \[\[in, out\]"),
    "conv1_1 alone": (LAST, r"no blocks"),
    "conv1_1 missing": (FIRST, r"'conv1_1'\], which is missing"),
    "conv1_1 of another width": (
        f"{FIRST}|[[9, 99], 'conv1_1']",
        r"conv1_1 takes 9 channels, the last block leaves 8",
    ),
    "conv1_1 to nothing": (f"{FIRST}|[[8, 0], 'conv1_1']", r"conv1_1 .*positive"),
    "conv1_1 to less than nothing": (f"{FIRST}|[[8, -9], 'conv1_1']", r"conv1_1 .*positive"),
    "conv1_1 of a ResNet": (f"{RES}|[[12, 99], 'conv1_1']", r"conv1_1"),
    "widths do not meet": (
        second("[[9, 8], 'mbconv_k3_t3', [], 0, 1]"),
        r"block 1 takes 9 channels, block 0 leaves 8",
    ),
    "families mixed": (
        f"[[8, 8], 'basic_block', [], 0, 1]|{FIRST}|{LAST}",
        r"MobileNetV2 and ResNet ops are mixed",
    ),
    "families mixed in a block": (
        second("[[8, 8], 'mbconv_k3_t3', ['basic_block'], 1, 1]"),
        r"MobileNetV2 and ResNet ops are mixed",
    ),
    "two ResNet blocks mixed": (
        f"{RES}|[[12, 16], 'bottleneck', [], 0, 1]",
        r"basic_block and bottleneck|mixe",
    ),
    "two ResNet blocks mixed in a block": (
        "[[8, 12], 'basic_block', ['bottleneck'], 1, 1]",
        r"basic_block and bottleneck|mixe",
    ),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_net_config(name):
    text, pattern = MALFORMED[name]
    with refused(ValueError, rf"net_config.*({pattern})"):
        Architecture.parse(text)


def test_a_network_that_would_fill_the_memory_is_not_built():
    large = Architecture.parse(
        second("[[8, 90000], 'mbconv_k3_t6', [], 0, 1]|[[90000, 8], 'mbconv_k3_t6', [], 0, 1]")
    )
    assert large.params() > 40_000 and large.mult_adds(224) > 0  # counted without allocating any
    with refused(
        ValueError, r"net_config has 48,.*million parameters, at most 1,000 million are built"
    ):
        large.build()


@pytest.mark.parametrize(
    "code",
    [
        "__import__('os').system('touch {}')",
        "open('{}', 'w')",
        "[[8, 8], 'mbconv_k3_t3', [open('{}', 'w')], 1, 1]",
    ],
)
@pytest.mark.parametrize("place", ["{code}", f"{FIRST}|{{code}}|{LAST}", f"{FIRST}|{{code}}"])
def test_code_in_a_net_config_is_not_run(code, place, tmp_path):
    touched = tmp_path / "touched"
    with refused(ValueError, "Python literal"):
        Architecture.parse(place.format(code=code.format(touched)))
    assert not touched.exists()


@pytest.fixture
def published(tmp_path):
    save_network(tmp_path, str(TINY), TINY.build(5))
    return tmp_path


def test_a_saved_network_loads_with_its_weights(published):
    saved = torch.load(published / "weights.pt")
    arch, net = load_published(published)
    assert arch == TINY
    assert net.classifier.out_features == 5
    assert all(torch.equal(value, saved[key]) for key, value in net.state_dict().items())


def test_net_type_may_be_left_out(published):
    (published / "net_config").write_text(str(TINY))
    assert load_published(str(published))[0] == TINY


LINES = str(TINY).split("|")


@pytest.mark.parametrize(
    "text",
    [
        "|\n".join(LINES) + "\nnet_type: mbv2\n",
        "|\n".join(LINES) + "|\nnet_type: mbv2\n",
        "|\r\n".join(LINES) + "\r\nnet_type: mbv2\r\n",
        "\n" + "|\n\n  ".join(LINES) + "  \n\n\nnet_type: mbv2",
        "\ufeff" + "|\n".join(LINES) + "\nnet_type:mbv2",
        str(TINY).replace("[], ", "[],\n ") + "\nnet_type: mbv2\n",
        f"{TINY}\nnet_type: mbv2\nsearched on a Tuesday\nnet_type: res\n",
        "|\n".join(LINES),
    ],
    ids=[
        "lines",
        "each with a bar",
        "of Windows",
        "blank",
        "with a mark",
        "within a block",
        "notes",
        "no net_type",
    ],
)
def test_a_net_config_on_several_lines_is_read_as_the_published_code_reads_it(text, published):
    (published / "net_config").write_bytes(text.encode())
    assert load_published(published)[0] == TINY


@pytest.mark.parametrize("name", ["net_config", "weights.pt"])
def test_missing_file(name, published):
    (published / name).unlink()
    with refused(FileNotFoundError, rf"holds no {name}"):
        load_published(published)


def test_missing_folder(tmp_path):
    with refused(FileNotFoundError, r"nowhere holds no net_config"):
        load_published(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        (f"{TINY}\nnet_type: res\n", r"net_type is res, but the ops are mbv2"),
        (f"{TINY}\nnet_type: mbv3\n", r"net_type is mbv3, but the ops are mbv2"),
        ("", r"literal"),
        ("net_type: mbv2\n", r"literal"),
        (f"{FIRST}|{FIRST}\nnet_type: mbv2", r"'conv1_1'\], which is missing"),
        (f"# the best one\n{TINY}\nnet_type: mbv2", r"literal"),
        (f"{TINY}\nsearched on a Tuesday\n", r"literal"),
        (b"\x89PNG\r\n\x1a\n\x00\xff", r"text|UTF-8|decode"),
    ],
    ids=[
        "other family",
        "unknown family",
        "empty",
        "no network",
        "no end",
        "comment",
        "notes",
        "binary",
    ],
)
def test_broken_net_config_file(text, pattern, published):
    (published / "net_config").write_bytes(text if isinstance(text, bytes) else text.encode())
    with refused(ValueError, rf"net_config.*({pattern})"):
        load_published(published)


def without_classifier(state):
    return {key: value for key, value in state.items() if not key.startswith("classifier")}


def without_one(state):
    state.pop("blocks.1.head_layer.depthwise_conv.0.weight")
    return state


OTHER = Architecture.parse(second("[[8, 8], 'mbconv_k7_t3', [], 0, 2]"))


def changed(key, change):
    return lambda state: state | {key: change(state[key])}


SPARSE = torch.eye(5).to_sparse()


@pytest.mark.filterwarnings("ignore:Validating sparse")
@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        (lambda state: OTHER.build(5).state_dict(), r"does not fit its net_config"),
        (
            without_one,
            r"does not fit its net_config: it lacks 'blocks\.1\.head_layer\.depthwise_conv",
        ),
        (
            lambda state: state | {"head.0": torch.zeros(1), "x": torch.zeros(1)},
            r"no place for 'head\.0' and 1 more",
        ),
        (without_classifier, r"no classifier\.weight"),
        (lambda state: {}, r"no classifier\.weight among the 0 entries"),
        (lambda state: [*state.values()], r"expected a state dict, found a list"),
        (lambda state: state["classifier.weight"], r"expected a state dict, found a Tensor"),
        (
            lambda state: state | {"classifier.weight": "five"},
            r"found a str as 'classifier\.weight'",
        ),
        (
            lambda state: {"state_dict": state, "epoch": 3},
            r"nothing but tensors, found a \w*[dD]ict as 'state_dict'",
        ),
        (lambda state: dict(enumerate(state.values())), r"0 is not the name of an entry"),
        (lambda state: state | {None: torch.zeros(1)}, r"None is not the name of an entry"),
        (
            changed("classifier.weight", lambda weight: weight[0, 0]),
            r"classifier\.weight has the shape \(\), expected",
        ),
        (
            changed("classifier.weight", lambda weight: weight[:0]),
            r"classifier\.weight has the shape \(0, 99\)",
        ),
        (
            changed("classifier.weight", lambda weight: weight[:1].expand(10**9, 99)),
            r"at most 1,000 million",
        ),
        (
            changed("classifier.bias", lambda bias: bias[:2]),
            r"'classifier\.bias' has .*\(2,\), expected \(5,\)",
        ),
        (
            changed("classifier.bias", lambda bias: bias + torch.nan),
            r"'classifier\.bias' holds numbers that",
        ),
        (
            changed("classifier.weight", lambda weight: weight / 0),
            r"'classifier\.weight' holds numbers that",
        ),
        (
            changed("classifier.bias", lambda bias: bias.double() + 1e300),
            r"'classifier\.bias' holds numbers that",
        ),
        (
            changed("classifier.bias", lambda bias: bias.int()),
            r"'classifier\.bias' holds torch\.int32, expected",
        ),
        (
            changed("classifier.bias", lambda bias: bias + 1j),
            r"'classifier\.bias' holds torch\.complex64, expected",
        ),
        (changed("classifier.bias", lambda bias: SPARSE), r"'classifier\.bias' is no plain tensor"),
        (
            changed("classifier.bias", lambda bias: bias.to("meta")),
            r"'classifier\.bias' is no plain tensor",
        ),
        (
            lambda state: state | {"module.classifier.bias": torch.zeros(5)},
            r"some entries are there twice",
        ),
    ],
)
def test_weights_that_do_not_fit(change, pattern, published):
    torch.save(change(torch.load(published / "weights.pt")), published / "weights.pt")
    with refused(ValueError, rf"weights\.pt.*({pattern})"):
        load_published(published)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision_are_read(kind, published):
    state = torch.load(published / "weights.pt")
    halved = {
        f"module.{key}": value.to(kind) if value.is_floating_point() else value
        for key, value in state.items()
    }
    torch.save(halved, published / "weights.pt")
    net = load_published(published)[1]
    assert net.classifier.weight.dtype == torch.float32
    torch.testing.assert_close(
        net.classifier.weight, state["classifier.weight"], rtol=0.01, atol=0.001
    )


def test_weights_of_an_old_pytorch_count_no_batches(published):
    state = torch.load(published / "weights.pt")
    torch.save(
        {key: value for key, value in state.items() if "num_batches" not in key},
        published / "weights.pt",
    )
    assert load_published(published)[0] == TINY


def test_a_whole_pickled_network_is_refused(published):
    torch.save(TINY.build(5), published / "weights.pt")
    with refused(ValueError, r"weights\.pt is damaged or holds more than weights"):
        load_published(published)


@pytest.mark.parametrize(
    "content",
    [b"", b"not weights at all", b"cos\nsystem\n", b"as text\n" * 9, b"PK\x03\x04cut off"],
)
def test_weights_that_are_no_weights(content, published):
    (published / "weights.pt").write_bytes(content)
    with refused(ValueError, r"weights\.pt"):
        load_published(published)


def test_flipped_bits_are_not_read_as_weights(published):
    content = bytearray((published / "weights.pt").read_bytes())
    weight = torch.load(published / "weights.pt")["classifier.weight"]
    content[content.index(weight.numpy().tobytes())] ^= 64
    (published / "weights.pt").write_bytes(content)
    with refused(ValueError, r"weights\.pt is damaged"):
        load_published(published)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_code_in_weights_is_not_run(published, tmp_path):
    touched = tmp_path / "touched"
    torch.save({"classifier.weight": Malicious(touched)}, published / "weights.pt")
    with refused(ValueError, r"weights\.pt"):
        load_published(published)
    assert not touched.exists()
