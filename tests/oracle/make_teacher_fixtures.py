"""Fixtures of the mini teacher from transformers (DeepseekV4ForCausalLM, float32, eager): the oracle of the forward pass.

argv: TEACHER_DIR train_tokens.u16 planted_tokens.u16 OUT.safetensors LOG.txt
For each stretch: tokens, per token log-sum-exp, the logit of the next token and of 8 fixed columns and the arg max; the routed experts of every
layer; the selected chunks of every CSA layer. Shares no code with lsa."""
import sys, inspect, json
import numpy as np, torch
from safetensors.numpy import save_file

teacher, train, planted, out, log = sys.argv[1:6]
logf = open(log, "w")
def say(*a):
    print(*a, file=logf, flush=True)
    print(*a, flush=True)

torch.backends.cuda.matmul.allow_tf32 = False
torch.backends.cudnn.allow_tf32 = False
torch.set_grad_enabled(False)
dev = "cuda" if torch.cuda.is_available() else "cpu"
from transformers import AutoConfig
import transformers
say("transformers", transformers.__version__, "torch", torch.__version__, dev)
from transformers import DeepseekV4ForCausalLM
model, info = DeepseekV4ForCausalLM.from_pretrained(teacher, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
say("loading info", {k: (sorted(v)[:10] if isinstance(v, (list, set)) else v) for k, v in info.items()})
model = model.to(dev).eval()
cfg = model.config
say(model)
import transformers.models.deepseek_v4.modeling_deepseek_v4 as M
logf.write(inspect.getsource(M))
logf.flush()

COLS = [0, 77, 555, 2047]
TRAIN = np.fromfile(train, "<u2").astype(np.int64)
PLANT = np.fromfile(planted, "<u2").astype(np.int64)
starts = np.flatnonzero(TRAIN == 0)
long_doc = [int(s) for s, e in zip(starts, list(starts[1:]) + [len(TRAIN)]) if e - s >= 4096]
STRETCH = [("train_a", TRAIN[int(starts[0]):][:1024]), ("train_b", TRAIN[long_doc[3]:][:4096]),
           ("planted_a", PLANT[8192 * 20:][:2048]), ("planted_b", PLANT[8192 * 40:][:8192])]

# Hooks: every indexer module returns its selection; every gate returns its experts. Collected in call order per forward.
caught = {}
def find(name_part):
    return [(n, m) for n, m in model.named_modules() if type(m).__name__.lower().endswith(name_part)]
indexers = [(n, m) for n, m in model.named_modules() if n.endswith("indexer")]
scorers = [(n, m) for n, m in model.named_modules() if n.endswith("indexer.scorer")]
gates = [(n, m) for n, m in model.named_modules() if n.endswith("mlp.gate") or n.endswith("ffn.gate")]
say("indexers", [(n, type(m).__name__) for n, m in indexers], "scorers", [(n, type(m).__name__) for n, m in scorers], "gates", [(n, type(m).__name__) for n, m in gates])

def describe(x):
    if torch.is_tensor(x):
        return (str(x.dtype), tuple(x.shape))
    if isinstance(x, (tuple, list)):
        return [describe(y) for y in x]
    return type(x).__name__
def hook(kind, name):
    def f(mod, args, kwargs, output):
        caught[(kind, name)] = output
    return f
for n, m in indexers:
    m.register_forward_hook(hook("indexer", n), with_kwargs=True)
for n, m in scorers:
    m.register_forward_hook(hook("scorer", n), with_kwargs=True)
for n, m in gates:
    m.register_forward_hook(hook("gate", n), with_kwargs=True)

def int_tensor(x):
    if torch.is_tensor(x):
        return x if not x.is_floating_point() else None
    if isinstance(x, (tuple, list)):
        for y in x:
            r = int_tensor(y)
            if r is not None:
                return r
    return None
def float_tensors(x):
    if torch.is_tensor(x):
        return [x] if x.is_floating_point() else []
    if isinstance(x, (tuple, list)):
        return [t for y in x for t in float_tensors(y)]
    return []

save = {"columns": np.array(COLS, np.int32)}
for name, ids in STRETCH:
    caught.clear()
    t = torch.tensor(ids[None], device=dev)
    logits = model(input_ids=t, use_cache=False).logits[0].float()
    n = len(ids)
    say(name, n, "logits", tuple(logits.shape), "nll", float(torch.nn.functional.cross_entropy(logits[:-1], t[0, 1:])))
    save[name + ".tokens"] = ids.astype(np.int32)
    save[name + ".lse"] = torch.logsumexp(logits.double(), -1).cpu().numpy().astype(np.float32)
    nxt = torch.cat([t[0, 1:], t[0, :1]])
    save[name + ".next"] = logits.gather(1, nxt[:, None])[:, 0].cpu().numpy()
    save[name + ".cols"] = logits[:, COLS].cpu().numpy()
    save[name + ".argmax"] = logits.argmax(-1).cpu().numpy().astype(np.int32)
    for (kind, mod), o in sorted(caught.items()):
        say(name, kind, mod, describe(o))
    experts = []
    for gn, _ in gates:
        e = int_tensor(caught[("gate", gn)])
        if e is None:
            say("no integer output of", gn)
            continue
        experts.append(np.sort(e.reshape(n, -1).cpu().numpy(), -1).astype(np.uint8))
    if experts:
        save[name + ".experts"] = np.stack(experts)  # [layers, n, k], ascending
    for o, (inn, _) in enumerate(indexers):
        sel = int_tensor(caught[("indexer", inn)])
        if sel is None:
            say("no integer output of", inn)
            continue
        sel = sel.reshape(n, -1).cpu().numpy()
        vis = (np.arange(n) + 1) // 4
        sel = np.where((sel >= 0) & (sel < vis[:, None]), sel, -1)
        sel = -np.sort(-sel, -1)  # descending, -1 last
        asc = sel[:, ::-1]
        h = np.full(n, 2166136261, np.uint64)  # FNV-1a over the ids, ascending
        for c in range(asc.shape[1]):
            on = asc[:, c] >= 0
            h = np.where(on, ((h ^ asc[:, c].astype(np.int64).clip(0).astype(np.uint64)) * np.uint64(16777619)) & np.uint64(0xFFFFFFFF), h)
        save[f"{name}.selhash{o}"] = h.astype(np.uint32).view(np.int32)
        near = np.zeros(n, bool)
        gap = np.full(n, np.inf, np.float32)
        sc = caught.get(("scorer", inn + ".scorer"))
        if sc is not None:
            ft = [f for f in float_tensors(sc) if f.dim() >= 2 and f.shape[-2] == n]
            if ft:
                f = ft[0].reshape(n, -1).float()
                f = f.masked_fill(torch.arange(f.shape[1], device=f.device)[None] >= torch.tensor(vis, device=f.device)[:, None], -float("inf"))
                k = sel.shape[1]
                if f.shape[1] > k:
                    top = torch.topk(f, k + 1, -1).values
                    gap = (top[:, k - 1] - top[:, k]).cpu().numpy().astype(np.float32)
                    near = gap < 1e-4
        else:
            say("no scorer output: ties unknown for", inn)
        say(name, inn, "near ties (gap < 1e-4):", int(near.sum()), "below 1e-5:", int((gap < 1e-5).sum()))
        at = np.flatnonzero(near)
        if len(at) == 0:
            at = np.array([n - 1])
        save[f"{name}.tie{o}"] = at.astype(np.int32)
        save[f"{name}.tiegap{o}"] = gap[at]
        save[f"{name}.tiesel{o}"] = np.ascontiguousarray(asc[at]).astype(np.int32)
save_file(save, out, metadata={"transformers": transformers.__version__, "torch": torch.__version__})
say("bytes", sum(v.nbytes for v in save.values()))
