/* lsa-dump over emulated kernels: documents whose rows are merged and sealed beside the GPU give whole shards
 * that a recheck finds equal, bit for bit; streaming the weights, in waves of any size, gives the same files;
 * weights that are damaged, cut or missing are refused and leave no shard. With arguments it is lsa-dump for
 * tests/fault/test_gpu_dump_kill.sh: `run OUT TEACHER TOKENS WAVE`, `resume OUT WAVE` (0: resident weights).
 */
#include <unistd.h>

#include <string>
#include <vector>

#include "tests/emulated/emu/emu.h"

#include "kernels/cuda/cuda_state.h"
extern "C" {
#include "data/dump/recheck.h"
#include "data/dump/run.h"
#include "data/lsa_shard.h"
#include "kernels/core/file.h"
}

/* The CUDA context of builds without CUDA: memory by the cpu column's calls. */
extern "C" lsa_status lsa_cuda_open(lsa_ctx *c, int, lsa_err *) {
    static cuda_state device;
    *c = {LSA_BACKEND_CUDA, &lsa_backend_cpu, &device, "emulated"};
    return LSA_OK;
}

static std::string g_dir;

static bool failed(const lsa_err *err) {
    printf("%s\n", err->msg);
    return true;
}

static bool dump(const char *name, lsa_dump_opts o) {
    lsa_err err = {};
    lsa_dump_plan plan;
    lsa_dump_times times;
    const std::string out = g_dir + "/" + name;
    if (lsa_dump_run(&o, out.c_str(), "cuda", false, &plan, &times, &err) != LSA_OK) return failed(&err);
    if (lsa_shards_verify(out.c_str(), &err) != LSA_OK) return failed(&err);
    return !(times.on_gpu && times.merging > 0 && times.sealing > 0 && times.gpu.gpu[LSA_GPU_MOE] > 0);
}

static std::string read(const std::string &path) {
    std::string s;
    if (FILE *const f = fopen(path.c_str(), "rb")) {
        for (int c; (c = fgetc(f)) != EOF;) s += (char)c;
        fclose(f);
    }
    return s;
}

/* Fails, naming `what`, and seals nothing. */
static bool refuse(const char *name, lsa_dump_opts o, const char *what) {
    lsa_err err = {};
    lsa_dump_plan plan;
    lsa_dump_times times;
    const std::string out = g_dir + "/" + name;
    const lsa_status st = lsa_dump_run(&o, out.c_str(), "cuda", false, &plan, &times, &err);
    const bool sealed = !access((out + "/shard_00000.h5").c_str(), F_OK) ||
                        read(out + "/manifest.json").find("shard_0") != std::string::npos;
    if (st == LSA_E_FORMAT && strstr(err.msg, what) && !strchr(err.msg, '\n') && !sealed) return false;
    printf("%s: not refused: %d %s\n", name, (int)st, err.msg);
    return true;
}

static bool recheck(const char *name) {
    lsa_err err = {};
    int64_t values = 0;
    lsa_recheck_opts o = {};
    o.n = 1, o.seed = 1, o.device = "cuda";
    if (lsa_dump_recheck(&values, (g_dir + "/" + name).c_str(), &o, &err) != LSA_OK) return failed(&err);
    return values < 500;
}

/* Shards byte for byte those of another run. */
static bool differ(const char *name, const char *other = "resident") {
    int n = 0;
    for (;; n++) {
        char file[64];
        snprintf(file, sizeof file, "/shard_%05d.h5", n);
        const std::string a = read(g_dir + "/" + other + file), b = read(g_dir + "/" + name + file);
        if (a != b) return printf("%s: %s differs\n", name, file) > 0;
        if (a.empty()) break;
    }
    return n < 2;
}

/* Documents of several chunks, of which some share slots with those before: keys of every CSA layer and the
 * last logits, streamed in one wave or several, equal those of resident weights. */
static bool ring_differs(const char *teacher) {
    enum { DOCS = 5, CHUNK = 16, MOST = 60, VOCAB = 256 };
    const int length[DOCS] = {60, 20, 33, 7, 50};
    lsa_err err = {};
    std::vector<float> seen[3]; /* resident, one wave, a wave a document */
    std::vector<int32_t> token[DOCS];
    uint32_t state = 11;
    for (int i = 0; i < DOCS; i++)
        for (int k = 0; k < length[i]; k++)
            token[i].push_back((state = state * 1664525u + 1013904223u) >> 24);
    for (int way = 0; way < 3; way++) {
        lsa_engine_opts eo = {};
        eo.without_layers = way > 0;
        lsa_engine *e = nullptr;
        lsa_ctx *ctx = nullptr;
        lsa_gpu_run *x = nullptr;
        if (lsa_engine_open(&e, teacher, &eo, &err) != LSA_OK ||
            lsa_ctx_create(&ctx, "cuda", &err) != LSA_OK ||
            lsa_gpu_run_create(&x, ctx, e, MOST, CHUNK, way > 0, &err) != LSA_OK)
            return failed(&err);
        const lsa_teacher_config *const c = lsa_engine_config(e);
        lsa_gpu_doc doc[DOCS] = {}, *feed[DOCS];
        std::vector<float> key[DOCS][LSA_MAX_CSA], logits((size_t)CHUNK * VOCAB);
        for (int i = 0; i < DOCS; i++) {
            doc[i].token = token[i].data(), doc[i].n = length[i];
            for (int o = 0; o < c->n_csa; o++) {
                key[i][o].resize((size_t)(length[i] / 4 * c->index_head_dim));
                doc[i].key[o] = key[i][o].data();
            }
            feed[i] = &doc[i];
        }
        lsa_status st = LSA_OK;
        for (int i = 0; i < DOCS && st == LSA_OK; i += way == 1 ? DOCS : 1)
            st = lsa_gpu_run_feed(x, feed + i, way == 1 ? DOCS : 1, nullptr, nullptr, &err);
        if (st == LSA_OK) st = lsa_gpu_run_drain(x, &err);
        if (st == LSA_OK) st = lsa_gpu_run_logits(x, length[DOCS - 1] - CHUNK, CHUNK, logits.data(), &err);
        for (int i = 0; i < DOCS; i++)
            for (int o = 0; o < c->n_csa; o++)
                seen[way].insert(seen[way].end(), key[i][o].begin(), key[i][o].end());
        seen[way].insert(seen[way].end(), logits.begin(), logits.end());
        lsa_gpu_run_destroy(x);
        lsa_ctx_destroy(ctx);
        lsa_engine_close(e);
        if (st != LSA_OK) return failed(&err);
    }
    for (int way = 1; way < 3; way++)
        if (seen[way] != seen[0]) return printf("ring: way %d differs from resident weights\n", way) > 0;
    return false;
}

/* Options of all runs of the kill test. */
static int program(int argc, char **argv) {
    lsa_err err = {};
    lsa_dump_plan plan;
    lsa_dump_times times;
    lsa_dump_opts o = lsa_dump_defaults();
    const bool run = !strcmp(argv[1], "run");
    if (argc != (run ? 6 : 4)) return 2;
    o.hidden_stride = 16, o.dense_every = 16, o.shard_bytes = 5000;
    o.wave_tokens = atoi(argv[argc - 1]), o.stream = o.wave_tokens > 0;
    if (run) o.teacher = argv[3], o.tokens = argv[4];
    const lsa_status st = run ? lsa_dump_run(&o, argv[2], "cuda", false, &plan, &times, &err)
                              : lsa_dump_resume(argv[2], "cuda", &o, &err);
    if (st != LSA_OK) printf("%s\n", err.msg);
    return st != LSA_OK;
}

int main(int argc, char **argv) {
    if (argc > 1) return program(argc, argv);
    char dir[] = "/tmp/lsa-emulated-XXXXXX";
    if (!mkdtemp(dir)) return 1;
    g_dir = dir;
    const std::string tokens = g_dir + "/documents.jsonl";
    FILE *const f = fopen(tokens.c_str(), "w");
    const int length[] = {60, 7, 20, 18};
    uint32_t state = 7;
    for (int n : length) {
        fprintf(f, "{\"tokens\": [");
        for (int i = 0; i < n; i++)
            fprintf(f, "%s%u", i ? ", " : "", (state = state * 1664525u + 1013904223u) >> 24);
        fprintf(f, "]}\n");
    }
    fclose(f);
    const std::string good = g_dir + "/good", damaged = g_dir + "/bad";
    const char *const python = getenv("LSA_PYTHON");
    if (system((std::string(python ? python : "python3") + " tests/emulated/stored_teacher.py " + good + " " +
                damaged)
                   .c_str()) != 0)
        return 1;
    lsa_dump_opts o = lsa_dump_defaults();
    o.teacher = good.c_str(), o.tokens = tokens.c_str();
    o.hidden_stride = 16, o.dense_every = 16, o.shard_bytes = 5000;
    int bad = ring_differs(good.c_str());
    bad += dump("resident", o);
    bad += recheck("resident");
    o.stream = true;
    o.wave_tokens = 70; /* two documents, then two */
    bad += dump("few", o) + differ("few");
    o.wave_tokens = 0; /* all */
    bad += dump("all", o) + differ("all");
    o.streams_dir = g_dir.c_str(); /* the same through a file */
    bad += dump("disk", o) + differ("disk");
    o.streams = "bf16"; /* other numbers, but the same ones for every wave and place */
    bad += dump("half_disk", o);
    o.streams_dir = nullptr, o.wave_tokens = 70;
    bad += dump("half", o) + differ("half", "half_disk") + !differ("half");
    o.streams = "f32", o.wave_tokens = 0;
    for (int stream = 0; stream < 2; stream++) {
        const std::string how = stream ? "_streamed" : "_resident";
        o.stream = stream;
        o.teacher = damaged.c_str();
        bad += refuse(("damaged" + how).c_str(), o, "layers.3.ffn.experts.2.w2.weight");
        const std::string cut = g_dir + "/cut" + how, gone = g_dir + "/gone" + how;
        if (system(("cp -r " + good + " " + cut + " && cp -r " + good + " " + gone + " && cd " + cut +
                    " && truncate -s -5000 \"$(ls *.safetensors | tail -1)\" && cd " + gone +
                    " && rm \"$(ls *.safetensors | tail -1)\"")
                       .c_str()) != 0)
            return 1;
        o.teacher = cut.c_str();
        bad += refuse(("cut_out" + how).c_str(), o, ".safetensors");
        o.teacher = gone.c_str();
        bad += refuse(("gone_out" + how).c_str(), o, ".safetensors");
    }
    lsa_err err = {};
    if (lsa_remove_tree(dir, &err) != LSA_OK) bad++;
    printf("%s\n", bad ? "FAILED" : "ok");
    return bad != 0;
}
