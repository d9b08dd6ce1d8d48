"""An independent PyTorch twin of the training step that `lsa-train bench` times: documents resident on the GPU, gather on the GPU,
torch.compile, bf16 products, fp32 masters, clipping, fused AdamW. One JSON line per batch size; exit 77 without torch or a GPU.

It shares no code with the trainer: the two are compared for speed in one run on one card.
"""
import argparse
import json
import statistics
import sys

try:
    import torch
    import torch._functorch.config
    import torch.nn.functional as F
except ImportError:
    print("twin_step: torch is not installed", file=sys.stderr)
    sys.exit(77)

HEAD_DIM, ROPE_DIM, N_KEY, N_HIDDEN, N_BATCHES = 128, 64, 131072, 2048, 8


def hadamard(n):
    h = torch.ones(1, 1)
    while h.shape[0] < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)], 0)
    return h / n**0.5


def layer_loss(x, cos, sin, keys, scale, cand, label, wa, g, wb, ww, had, heads):
    """Focal loss of one layer: x [B,d] bf16, cand [B,N] indices into keys [K,128] e4m3, label [N]."""
    batch = x.shape[0]
    a = (x @ wa.t()).float()
    u = g * a * torch.rsqrt(a.pow(2).mean(-1, keepdim=True) + 1e-6)
    q = (u.to(torch.bfloat16) @ wb.t()).view(batch, heads, HEAD_DIM)
    r = q[..., HEAD_DIM - ROPE_DIM:].float().view(batch, heads, ROPE_DIM // 2, 2)
    c, s = cos[:, None, :], sin[:, None, :]
    r = torch.stack([r[..., 0] * c - r[..., 1] * s, r[..., 0] * s + r[..., 1] * c], -1).flatten(-2)
    q = torch.cat([q[..., :HEAD_DIM - ROPE_DIM], r.to(torch.bfloat16)], -1) @ had
    w = (x @ ww.t()).float() * (HEAD_DIM * heads) ** -0.5
    k = (keys[cand].float() * scale[cand][..., None]).to(torch.bfloat16)  # [B,N,128]
    p = torch.bmm(k, q.transpose(1, 2))  # [B,N,H]
    z = (F.relu(p).float() * w[:, None, :]).sum(-1)
    bce = F.binary_cross_entropy_with_logits(z, label.expand_as(z), reduction="none")
    prob = torch.sigmoid(z)
    miss = torch.where(label > 0, 1 - prob, prob)
    return (miss * miss * bce).mean()


class Twin:
    def __init__(self, o, dev):
        L, H, r, d = o.layers, o.heads, o.rank, o.hidden
        gen = torch.Generator(device=dev).manual_seed(1)

        def weight(rows, cols):
            return ((torch.rand(rows, cols, device=dev, generator=gen) * 2 - 1) / cols**0.5).requires_grad_()

        self.o, self.dev = o, dev
        self.layers = [[weight(r, d), torch.ones(r, device=dev, requires_grad=True), weight(H * HEAD_DIM, r), weight(H, d)]
                       for _ in range(L)]
        self.params = [p for layer in self.layers for p in layer]
        self.keys = [torch.randn(N_KEY, HEAD_DIM, device=dev, generator=gen).mul_(100).clamp_(-448, 448).to(torch.float8_e4m3fn) for _ in range(L)]
        self.scale = [torch.rand(N_KEY, device=dev, generator=gen) * 0.005 + 0.005 for _ in range(L)]
        self.hidden = [torch.randn(N_HIDDEN, d, device=dev, generator=gen).to(torch.bfloat16) for _ in range(L)]
        self.freq = 160000.0 ** (-torch.arange(ROPE_DIM // 2, device=dev) * 2 / ROPE_DIM)
        self.had = hadamard(HEAD_DIM).to(dev, torch.bfloat16)
        self.opt = torch.optim.AdamW(self.params, lr=1e-4, weight_decay=0.01, fused=True, capturable=True)
        self.loss_fn = torch.compile(layer_loss, dynamic=False) if o.compile else layer_loss
        self.label = (torch.arange(o.candidates, device=dev) < o.candidates // 4).float()

    def batches(self, batch):
        g = torch.Generator(device=self.dev).manual_seed(2)
        return [(torch.randint(N_HIDDEN, (batch,), device=self.dev, generator=g),
                 torch.randint(N_KEY, (batch, self.o.candidates), device=self.dev, generator=g)) for _ in range(N_BATCHES)]

    def step(self, row, cand):
        angle = row.float()[:, None] * 64 * self.freq
        cos, sin = angle.cos(), angle.sin()
        part = 256  # rows at a time: [B,N,H] of one layer is 67 MB for 256 rows in bf16, several copies in flight
        total = 0.0
        self.opt.zero_grad(set_to_none=False)
        for i, (wa, g, wb, ww) in enumerate(self.layers):
            b16 = [w.to(torch.bfloat16) for w in (wa, wb, ww)]
            for j in range(0, row.shape[0], part):
                rows = slice(j, j + part)
                x = self.hidden[i][row[rows]]
                share = x.shape[0] / row.shape[0] / self.o.layers
                loss = self.loss_fn(x, cos[rows], sin[rows], self.keys[i], self.scale[i], cand[rows], self.label, b16[0], g, b16[1],
                                    b16[2], self.had, self.o.heads) * share
                loss.backward(retain_graph=j + part < row.shape[0])
                total = total + loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.params, 1.0, foreach=True)
        self.opt.step()
        return total, norm


def timed(run, batches, steps, warmup):
    times = []
    for i in range(warmup + steps):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record()
        out = run(*batches[i % len(batches)])
        b.record()
        b.synchronize()
        if i >= warmup:
            times.append(a.elapsed_time(b))
    return statistics.median(times), out


def graphed(twin, batch):
    """The step as a CUDA graph over fixed input tensors."""
    row = torch.zeros(batch, dtype=torch.long, device=twin.dev)
    cand = torch.zeros(batch, twin.o.candidates, dtype=torch.long, device=twin.dev)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            twin.step(row, cand)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = twin.step(row, cand)

    def run(r, c):
        row.copy_(r)
        cand.copy_(c)
        graph.replay()
        return out

    return run


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("layers", 8), ("heads", 128), ("rank", 2048), ("hidden", 4096), ("candidates", 2048), ("steps", 20), ("warmup", 6)):
        p.add_argument("--" + name, type=int, default=value)
    p.add_argument("--batch", type=int, nargs="+", default=[256, 1024, 64])
    p.add_argument("--no-compile", dest="compile", action="store_false")
    o = p.parse_args()
    if not torch.cuda.is_available():
        print("twin_step: no GPU", file=sys.stderr)
        sys.exit(77)
    torch.set_float32_matmul_precision("high")
    torch._functorch.config.donated_buffer = False  # the bf16 weights of a layer serve several parts of the batch
    dev = torch.device("cuda")
    for batch in o.batch:
        twin, variant, best, out = Twin(o, dev), None, None, None
        batches = twin.batches(batch)
        ms, out = timed(twin.step, batches, o.steps, o.warmup)
        best, variant = ms, "compile" if o.compile else "eager"
        try:
            ms, out = timed(graphed(twin, batch), batches, o.steps, o.warmup)
            if ms < best:
                best, variant = ms, variant + "+graph"
        except RuntimeError as e:  # capture is an extra: the plain step has been timed
            print(f"twin_step: no graph at batch {batch}: {str(e).splitlines()[0]}", file=sys.stderr)
        print(json.dumps({"bench": "twin_step", "torch": torch.__version__, "device": torch.cuda.get_device_name(), "batch": batch,
                          "ms": round(best, 4), "samples_per_s": round(batch / best * 1e3), "variant": variant,
                          "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2), "loss": float(out[0]),
                          "grad_norm": float(out[1])}), flush=True)
        del twin, batches, out
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


if __name__ == "__main__":
    main()
