/* lsa-dump over emulated kernels: documents whose rows are merged and sealed beside the GPU give whole shards
 * that a recheck finds equal, bit for bit; streaming the weights, in waves of any size, gives the same files.
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

/* Fails, naming `what`, and seals nothing. */
static bool refuse(const char *name, lsa_dump_opts o, const char *what) {
    lsa_err err = {};
    lsa_dump_plan plan;
    lsa_dump_times times;
    const std::string out = g_dir + "/" + name;
    const lsa_status st = lsa_dump_run(&o, out.c_str(), "cuda", false, &plan, &times, &err);
    if (st == LSA_E_FORMAT && strstr(err.msg, what) && access((out + "/shard_00000.h5").c_str(), F_OK))
        return false;
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

static std::string read(const std::string &path) {
    std::string s;
    if (FILE *const f = fopen(path.c_str(), "rb")) {
        for (int c; (c = fgetc(f)) != EOF;) s += (char)c;
        fclose(f);
    }
    return s;
}

/* Shards byte for byte those of the resident run. */
static bool differ(const char *name) {
    int n = 0;
    for (;; n++) {
        char file[64];
        snprintf(file, sizeof file, "/shard_%05d.h5", n);
        const std::string a = read(g_dir + "/resident" + file), b = read(g_dir + "/" + name + file);
        if (a != b) return printf("%s: %s differs\n", name, file) > 0;
        if (a.empty()) break;
    }
    return n < 2;
}

int main() {
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
    int bad = dump("resident", o);
    bad += recheck("resident");
    o.stream = true;
    o.wave_tokens = 70; /* two documents, then two */
    bad += dump("few", o) + differ("few");
    o.wave_tokens = 0; /* all */
    bad += dump("all", o) + differ("all");
    o.teacher = damaged.c_str();
    bad += refuse("damaged", o, "layers.3.ffn.experts.2.w2.weight");
    lsa_err err = {};
    if (lsa_remove_tree(dir, &err) != LSA_OK) bad++;
    printf("%s\n", bad ? "FAILED" : "ok");
    return bad != 0;
}
