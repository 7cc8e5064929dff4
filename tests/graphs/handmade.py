"""Graphs written by hand: free axes in odd places, integers, booleans, scalars, control flow, contrib operators."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper, parser

RNG = np.random.default_rng(0)


def save(
    path: Path,
    text: str,
    *,
    opset: int = 18,
    ir: int = 10,
    extra: str = "",
    functions: str = "",
    named: bool = True,
    **weights: np.ndarray,
) -> None:
    """A graph in ONNX's own text, with its initializers as arrays.

    Args:
        extra: Further operator sets, such as ``, "com.microsoft" : 1``.
        functions: Text of local functions.
        named: Whether free axes keep their names.
    """
    head = f'<ir_version: {ir}, opset_import: ["" : {opset}{extra}]>'
    model = parser.parse_model(f"{head}\n{text}\n{functions}")
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
    for value in () if named else (*model.graph.input, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.Clear()
    onnx.save(model, path)


def normal(*shape: int, dtype: str = "float32") -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(dtype)


# -- axes -------------------------------------------------------------------------------------------


def anonymous_axes(path: Path) -> None:
    """Free axes without names: the first is the batch, the second is nothing but free."""
    save(path, "g (float[N,T,4] x) => (float[N,T,3] y) { y = MatMul(x, w) }", named=False, w=normal(4, 3))


def lying_names(path: Path) -> None:
    """`n` names three axes, of which two are of one size and the third, of weights, is 4."""
    save(path, "g (float[n,n] x, float[n,2] t) => (float[n,n] y) { p = MatMul(x, w)\n y = Concat<axis=1>(p, t) }",
         w=normal(4, 3))  # fmt: skip


def called_free(path: Path) -> None:
    """`width` is called free; the graph reshapes to 6."""
    save(path, """g (float[batch,width] x)
        => (float[batch,2] y) {
            r = Reshape(x, s)
            f = Flatten(r)
            y = MatMul(f, w)
        }""",
         s=np.array([0, 2, 3]), w=normal(6, 2))  # fmt: skip


def tied_axes(path: Path) -> None:
    """Two axes of two names that must be equal."""
    save(path, """g (float[batch,a,4] x, float[batch,b,4] z)
        => (float[batch,a,3] y) {
            s = Add(x, z)
            y = MatMul(s, w)
        }""",
         w=normal(4, 3))  # fmt: skip


def kv_cache(path: Path) -> None:
    """A cache that may be empty, and what it is after this step: `past + tokens` is a sum."""
    save(
        path,
        """g (float[batch,tokens,8] x, float[batch,past,8] past_keys)
        => (float[batch,tokens,8] y, float[batch,"past + tokens",8] keys) {
            keys = Concat<axis=1>(past_keys, x)
            t = Transpose<perm=[0,2,1]>(keys)
            s = MatMul(x, t)
            p = Softmax<axis=-1>(s)
            y = MatMul(p, keys)
        }""".replace('"past + tokens"', "total"),
    )


def fixed_batch(path: Path) -> None:
    save(path, "g (float[3,4] x) => (float[3,2] y) { y = MatMul(x, w) }", w=normal(4, 2))


def time_first(path: Path) -> None:
    """Anonymous [time, batch, 4] of an RNN written with its operator."""
    save(path, "g (float[N,M,4] x) => (float[N,1,M,5] y, float[1,M,5] h) { y, h = RNN<hidden_size=5>(x, w, r) }",
         named=False, w=normal(1, 5, 4), r=normal(1, 5, 5) / 3)  # fmt: skip


def shape_input(path: Path) -> None:
    """An int64 input that is the shape of what comes out."""
    save(path, "g (float[batch,12] x, int64[2] shape) => (float[p,q] y) { f = Mul(x, w)\n y = Reshape(f, shape) }",
         w=normal(12))  # fmt: skip


def top_k(path: Path) -> None:
    """How many to keep is an input."""
    save(
        path,
        "g (float[batch,16] x, int64[1] k) => (float[batch,kept] y, int64[batch,kept] where) { y, where = TopK(x, k) }",
    )


def resize_to(path: Path) -> None:
    """An image and the size it is to have."""
    save(path, """g (float[batch,3,height,width] image, int64[4] size) => (float[b,c,h,w] y) {
        f = Conv(image, k)
        y = Resize<mode="linear">(f, , , size)
    }""", k=normal(3, 3, 1, 1))  # fmt: skip


def scalar_input(path: Path) -> None:
    """A temperature of rank 0 divides the scores."""
    save(path, """g (float[batch,4] x, float temperature)
        => (float[batch,3] y) {
            m = MatMul(x, w)
            s = Div(m, temperature)
            y = Softmax<axis=-1>(s)
        }""",
         w=normal(4, 3))  # fmt: skip


def passed_through(path: Path) -> None:
    """An input that is also an output, an output given twice, and an input that nothing reads."""
    save(path, """g (float[batch,4] x, float[batch,2] unread)
        => (float[batch,4] same, float[batch,3] y, float[batch,3] again) {
            same = Identity(x)
            y = MatMul(x, w)
            again = Identity(y)
        }""",
         w=normal(4, 3))  # fmt: skip


# -- dtypes -----------------------------------------------------------------------------------------


def bool_mask(path: Path) -> None:
    save(path, """g (float[batch,tokens,4] x, bool[batch,tokens] mask) => (float[batch,3] y, bool[batch] any) {
        u = Unsqueeze(mask, last)
        k = Where(u, x, zero)
        s = ReduceMean<keepdims=0>(k, one)
        y = MatMul(s, w)
        n = Cast<to=7>(mask)
        c = ReduceMax<keepdims=0>(n, one)
        any = Cast<to=9>(c)
    }""", last=np.array([-1]), one=np.array([1]), zero=np.float32(0), w=normal(4, 3))  # fmt: skip


def bytes_in(path: Path) -> None:
    """uint8 pixels, channels last."""
    save(path, """g (uint8[batch,8,8,3] pixels) => (float[batch,5] y) {
        f = Cast<to=1>(pixels)
        d = Div(f, full)
        t = Transpose<perm=[0,3,1,2]>(d)
        c = Conv<pads=[1,1,1,1]>(t, k)
        p = GlobalAveragePool(c)
        y = Flatten(p)
    }""", full=np.float32(255), k=normal(5, 3, 3, 3))  # fmt: skip


def int_arithmetic(path: Path) -> None:
    """int32 in, int64 and bool out."""
    save(path, """g (int32[batch,6] x)
        => (int64[batch] best, bool[batch,6] large) {
            best = ArgMax<axis=1,keepdims=0>(x)
            large = Greater(x, one)
        }""",
         one=np.int32(0))  # fmt: skip


def float16_in(path: Path) -> None:
    save(
        path,
        "g (float16[batch,8] x) => (float16[batch,3] y) { m = MatMul(x, w)\n y = Softmax<axis=-1>(m) }",
        w=normal(8, 3, dtype="float16"),
    )


def float64_in(path: Path) -> None:
    save(
        path,
        "g (double[batch,8] x) => (double[batch,3] y) { m = MatMul(x, w)\n y = Tanh(m) }",
        w=normal(8, 3, dtype="float64"),
    )


def bfloat16_in(path: Path) -> None:
    """NumPy has no bfloat16."""
    save(path, "g (bfloat16[batch,8] x) => (bfloat16[batch,8] y) { y = Add(x, x) }")


def strings_in(path: Path) -> None:
    save(path, 'g (string[n] x) => (string[n] y) { y = StringNormalizer<case_change_action="LOWER">(x) }')


def strings_out(path: Path) -> None:
    save(path, """g (int64[n] x)
        => (string[n] y) {
            y = ai.onnx.ml.LabelEncoder<keys_int64s=[0,1],values_strings=["no","yes"]>(x)
        }""",
         extra=', "ai.onnx.ml" : 3')  # fmt: skip


def sequence_in(path: Path) -> None:
    save(path, "g (seq(float[n,2]) x) => (float[m,2] y) { y = ConcatFromSequence<axis=0>(x) }")


# -- control flow and sizes that depend on values ---------------------------------------------------


def nonzero(path: Path) -> None:
    save(path, "g (float[batch,6] x) => (int64[2,found] where) { p = Relu(x)\n where = NonZero(p) }")


def loop(path: Path) -> None:
    """x times w, as often as an input says."""
    save(path, """g (float[batch,4] x, int64 times) => (float[batch,4] y) {
        yes = Constant<value = bool {1}>()
        y = Loop(times, yes, x) <body = b (int64 i, bool go, float[n,4] s) => (bool on, float[n,4] t) {
            on = Identity(go)
            m = MatMul(s, w)
            t = Tanh(m)
        }>
    }""", w=normal(4, 4))  # fmt: skip


def branch(path: Path) -> None:
    """Two ways, chosen by a boolean of rank 0."""
    save(path, """g (float[batch,4] x, bool flip) => (float[batch,4] y) {
        y = If(flip) <then_branch = a () => (float[n,4] p) { p = Neg(x) },
                      else_branch = b () => (float[n,4] q) { q = Mul(x, x) }>
    }""")  # fmt: skip


def scan(path: Path) -> None:
    """A running sum over time."""
    save(path, """g (float[time,4] x, float[4] start) => (float[4] last, float[time,4] sums) {
        last, sums = Scan<num_scan_inputs=1, body = b (float[4] s, float[4] v) => (float[4] t, float[4] o) {
            t = Add(s, v)
            o = Identity(t)
        }>(start, x)
    }""")  # fmt: skip


def random_numbers(path: Path) -> None:
    """Never the same twice: nothing can be compared."""
    save(path, "g (float[batch,4] x) => (float[batch,4] y) { r = RandomNormalLike(x)\n y = Add(x, r) }")


def suppression(path: Path) -> None:
    """A detector's last step: as many boxes as are left."""
    save(path, """g (float[batch,boxes,4] boxes, float[batch,classes,boxes] scores) => (int64[kept,3] chosen) {
        chosen = NonMaxSuppression(boxes, scores, most, overlap, least)
    }""", most=np.array([3]), overlap=np.array([0.5], np.float32), least=np.array([0.1], np.float32))  # fmt: skip


# -- old and new operator sets, functions, external data -------------------------------------------


def old_opset(path: Path) -> None:
    """Operator set 7, with initializers among the inputs as IR version 3 has them."""
    save(path, """g (float[1,3,8,8] x, float[4,3,3,3] k, float[4] s, float[4] b, float[4] m, float[4] v)
        => (float[1,4] y) {
        c = Conv<pads=[1,1,1,1]>(x, k)
        n = BatchNormalization(c, s, b, m, v)
        r = Relu(n)
        p = GlobalAveragePool(r)
        y = Flatten(p)
    }""", opset=7, ir=3, k=normal(4, 3, 3, 3), s=normal(4), b=normal(4), m=normal(4), v=normal(4) ** 2)  # fmt: skip


def new_attention(path: Path) -> None:
    """The standard's own Attention, of operator set 23."""
    save(path, """g (float[batch,tokens,8] q, float[batch,tokens,8] k, float[batch,tokens,8] v)
        => (float[batch,tokens,8] y) {
            y = Attention<q_num_heads=2, kv_num_heads=2>(q, k, v)
        }""",
         opset=23, ir=11)  # fmt: skip


def external_data(path: Path) -> None:
    save(path, "g (float[batch,32] x) => (float[batch,16] y) { y = MatMul(x, w) }", w=normal(32, 16))
    onnx.save(onnx.load(path), path, save_as_external_data=True, location=f"{path.stem}.bin", size_threshold=0)


def local_function(path: Path) -> None:
    save(path, """g (float[batch,4] x)
        => (float[batch,3] y) {
            m = MatMul(x, w)
            y = local.soft(m)
        }""", extra=', "local" : 1',
         functions="""<domain: "local", opset_import: ["" : 18]> soft (a) => (b) {
            e = Exp(a)
            i = Constant<value = int64[1] {-1}>()
            s = ReduceSum(e, i)
            b = Div(e, s)
         }""",
         w=normal(4, 3))  # fmt: skip


def foreign_domain(path: Path) -> None:
    save(path, "g (float[batch,4] x) => (float[batch,4] y) { y = acme.Secret(x) }", extra=', "acme" : 1')


def spectrum(path: Path) -> None:
    """Short-time Fourier transform of a waveform."""
    save(path, "g (float[batch,samples,1] wave) => (float[batch,frames,9,2] y) { y = STFT(wave, step, window) }",
         step=np.int64(8), window=np.hanning(16).astype(np.float32))  # fmt: skip


def gathers(path: Path) -> None:
    """Two tables of different sizes, and an einsum."""
    save(path, """g (int64[batch] user, int64[batch] item) => (float[batch] score) {
        u = Gather(users, user)
        i = Gather(items, item)
        score = Einsum<equation="bi,bi->b">(u, i)
    }""", users=normal(50, 8), items=normal(7, 8))  # fmt: skip


def three_inputs(path: Path) -> None:
    """A picture, a row of numbers, and a class."""
    save(path, """g (float[batch,3,height,width] image, float[batch,5] row, int32[batch] kind) => (float[batch,4] y) {
        c = Conv(image, k)
        p = GlobalAveragePool(c)
        f = Flatten(p)
        e = Gather(table, kind)
        all = Concat<axis=1>(f, row, e)
        y = MatMul(all, w)
    }""", k=normal(6, 3, 3, 3), table=normal(3, 2), w=normal(13, 4))  # fmt: skip


# -- com.microsoft and ai.onnx.ml -------------------------------------------------------------------

MICROSOFT = ', "com.microsoft" : 1'


def contrib_gelu(path: Path) -> None:
    save(path, """g (float[batch,tokens,8] x) => (float[batch,tokens,8] y) {
        a = com.microsoft.Gelu(x)
        b = com.microsoft.FastGelu(a, bias)
        c = com.microsoft.BiasGelu(b, bias)
        y = com.microsoft.QuickGelu<alpha=1.702>(c)
    }""", extra=MICROSOFT, bias=normal(8))  # fmt: skip


def contrib_norm(path: Path) -> None:
    """SkipLayerNormalization with its sum as second output, and a plain one of RMS."""
    save(path, """g (float[batch,tokens,8] x, float[batch,tokens,8] skip)
        => (float[batch,tokens,8] y, float[batch,tokens,8] sum) {
        n, , , sum = com.microsoft.SkipLayerNormalization<epsilon=0.00001>(x, skip, gamma, beta, bias)
        y = com.microsoft.SkipSimplifiedLayerNormalization<epsilon=0.00001>(n, skip, gamma)
    }""", extra=MICROSOFT, gamma=normal(8), beta=normal(8) * 2, bias=normal(8) / 2)  # fmt: skip


def contrib_matmul(path: Path) -> None:
    save(path, """g (float[batch,4,8] x, float[batch,4,8] z)
        => (float[batch,4,4] y) {
            y = com.microsoft.FusedMatMul<transB=1, alpha=0.5>(x, z)
        }""",
         extra=MICROSOFT)  # fmt: skip


def contrib_attention(path: Path) -> None:
    """Projections in one, two heads, and a mask by key."""
    save(path, """g (float[batch,tokens,8] x, int32[batch,tokens] mask)
        => (float[batch,tokens,8] y) {
            y = com.microsoft.Attention<num_heads=2>(x, w, b, mask)
        }""",
         extra=MICROSOFT, w=normal(8, 24), b=normal(24))  # fmt: skip


def contrib_unknown(path: Path) -> None:
    """Something of com.microsoft that only ONNX Runtime has."""
    save(path, """g (float[batch,4,4] x) => (float[batch,4,4] y) {
        s = Add(x, eye)
        y = com.microsoft.Inverse(s)
    }""", extra=MICROSOFT, eye=8 * np.eye(4, dtype=np.float32))  # fmt: skip


def linear_regressor(path: Path) -> None:
    """What sklearn's converters make: a scaler and a linear model."""
    weights = ",".join(map(str, normal(4)))
    save(path, f"""g (float[batch,4] x) => (float[batch,1] y) {{
        s = ai.onnx.ml.Scaler<offset=[0.1,0.2,0.3,0.4],scale=[1.0,2.0,0.5,1.5]>(x)
        y = ai.onnx.ml.LinearRegressor<coefficients=[{weights}],intercepts=[0.5],targets=1>(s)
    }}""", extra=', "ai.onnx.ml" : 1')  # fmt: skip


def tree_classifier(path: Path) -> None:
    """A stump with class labels and scores."""
    node = helper.make_node(
        "TreeEnsembleClassifier", ["x"], ["label", "scores"], domain="ai.onnx.ml",
        nodes_treeids=[0, 0, 0], nodes_nodeids=[0, 1, 2], nodes_featureids=[0, 0, 0], nodes_values=[0.0, 0.0, 0.0],
        nodes_modes=["BRANCH_LEQ", "LEAF", "LEAF"], nodes_truenodeids=[1, 0, 0], nodes_falsenodeids=[2, 0, 0],
        class_treeids=[0, 0], class_nodeids=[1, 2], class_ids=[0, 1], class_weights=[1.0, 1.0],
        classlabels_int64s=[0, 1], post_transform="NONE",
    )  # fmt: skip
    graph = helper.make_graph(
        [node], "g",
        [helper.make_tensor_value_info("x", 1, ["batch", 4])],
        [
            helper.make_tensor_value_info("label", 7, ["batch"]),
            helper.make_tensor_value_info("scores", 1, ["batch", 2]),
        ],
    )  # fmt: skip
    sets = [helper.make_opsetid("", 18), helper.make_opsetid("ai.onnx.ml", 3)]
    onnx.save(helper.make_model(graph, opset_imports=sets, ir_version=10), path)


def map_out(path: Path) -> None:
    """sklearn's ZipMap: a sequence of dictionaries."""
    node = helper.make_node("ZipMap", ["x"], ["y"], domain="ai.onnx.ml", classlabels_int64s=[0, 1, 2])
    row = helper.make_map_type_proto(7, helper.make_tensor_type_proto(1, []))
    graph = helper.make_graph(
        [node], "g",
        [helper.make_tensor_value_info("x", 1, ["batch", 3])],
        [helper.make_value_info("y", helper.make_sequence_type_proto(row))],
    )  # fmt: skip
    sets = [helper.make_opsetid("", 18), helper.make_opsetid("ai.onnx.ml", 3)]
    onnx.save(helper.make_model(graph, opset_imports=sets, ir_version=10), path)
