/* The row and key codecs of the tiers against the host's small formats: a row that the cache simulation has
 * been through comes back as it was, others as the simulation makes them; keys are the shards' codec. */
#include "emulated/decode_pages_cu.cpp"

extern "C" {
#include "infer/numeric.h"
#include "kernels/core/rng.h"
}

enum { CHUNKS = 24, DI = 128 };

static int check_rows(int D, int rope, bool simulated) {
    static float in[CHUNKS * 512], key[CHUNKS * DI], out[CHUNKS * 512];
    static uint8_t rows[CHUNKS * 1024], keys[CHUNKS * 132];
    static int32_t sel[CHUNKS], n_sel[1] = {CHUNKS}, out_sel[CHUNKS];
    const int bytes = encoded_row_bytes(D, rope);
    lsa_rng g = lsa_rng_make(3, (uint64_t)D);
    int bad = 0;
    for (int i = 0; i < CHUNKS * D; i++) /* from far below the smallest scale to far above 448 */
        in[i] = ldexpf(lsa_rng_uniform(&g) - 0.5f, (int)lsa_rng_below(&g, 12) + i / D % 9 * 4 - 24);
    for (int i = 0; i < CHUNKS * DI; i++) key[i] = 3 * lsa_rng_uniform(&g) - 1.5f;
    for (int i = 0; i < D; i++) in[i] = 0; /* a row of zeros */
    for (int i = 0; i < DI; i++) key[i] = 0;
    for (int c = 0; simulated && c < CHUNKS; c++) {
        lsa_sim_fp8(in + c * D, D - rope);
        for (int i = D - rope; i < D; i++) in[c * D + i] = lsa_round_bf16(in[c * D + i]);
    }
    memset(rows, 0xee, sizeof rows);
    store_args a = {};
    a.row = in, a.key = key, a.rows[0] = rows, a.keys[0] = keys;
    a.D = D, a.Di = DI, a.rope = rope, a.row_bytes = bytes, a.key_bytes = DI + 4, a.page = 1;
    emu::launch(dim3(CHUNKS), dim3(THREADS), 0, [&] { store_k(a); });
    for (int i = 0; i < CHUNKS; i++) sel[i] = i;
    gather_args b = {};
    b.rows = {rows, NULL, 1, bytes};
    b.sel = sel, b.n_sel = n_sel, b.out = out, b.out_sel = out_sel, b.D = D, b.rope = rope, b.top = CHUNKS;
    emu::launch(dim3(1, (CHUNKS + WARPS - 1) / WARPS), dim3(THREADS), 0, [&] { gather_k(b); });
    for (int c = 0; c < CHUNKS; c++) {
        float want[512];
        uint8_t k[132];
        memcpy(want, in + c * D, (size_t)D * sizeof *want);
        lsa_sim_fp8(want, D - rope);
        for (int i = D - rope; i < D; i++) want[i] = lsa_round_bf16(want[i]);
        bad += memcmp(want, out + c * D, (size_t)D * sizeof *want) != 0;
        if (simulated) bad += memcmp(in + c * D, out + c * D, (size_t)D * sizeof *want) != 0;
        lsa_key_encode(k, key + c * DI);
        bad += memcmp(k, keys + c * 132, sizeof k) != 0;
        for (int i = D - rope + 2 * rope + (D - rope + 63) / 64; i < bytes; i++)
            bad += rows[c * bytes + i] != 0;
    }
    bad += rows[CHUNKS * bytes] != 0xee;
    printf("D %d, rope %d, %d bytes%s: %s\n", D, rope, bytes, simulated ? ", simulated" : "",
           bad ? "FAILED" : "ok");
    return bad;
}

int main() {
    int bad = 0;
    for (int simulated = 0; simulated < 2; simulated++) {
        bad += check_rows(512, 64, simulated);
        bad += check_rows(128, 64, simulated);
        bad += check_rows(80, 16, simulated);
    }
    bad += encoded_row_bytes(512, 64) != 584 || encoded_row_bytes(128, 64) != 200;
    return bad != 0;
}
