/* Times of the stages: events between launches, read when they have long passed. */
#include "kernels/cuda/teacher/teacher_state.h"

lsa_status teacher_marks_create(lsa_gpu_teacher *t, lsa_err *err) {
    for (teacher_marks &m : t->marks)
        for (cudaEvent_t &e : m.event) LSA_CUDA(cudaEventCreate(&e));
    return LSA_OK;
}

void teacher_marks_destroy(lsa_gpu_teacher *t) {
    for (teacher_marks &m : t->marks)
        for (cudaEvent_t e : m.event)
            if (e) cudaEventDestroy(e);
}

static lsa_status sum_up(lsa_gpu_teacher *t, teacher_marks *m, lsa_err *err) {
    if (m->n == 0) return LSA_OK;
    LSA_CUDA(cudaEventSynchronize(m->event[m->n - 1]));
    for (int i = 1; i < m->n; i++) {
        float ms = 0;
        LSA_CUDA(cudaEventElapsedTime(&ms, m->event[i - 1], m->event[i]));
        t->seconds[m->stage[i]] += 1e-3 * (double)ms;
    }
    m->n = 0;
    return LSA_OK;
}

lsa_status teacher_marks_begin(lsa_gpu_teacher *t, lsa_err *err) {
    t->at_marks = (t->at_marks + 1) % TEACHER_MARKS;
    const lsa_status st = sum_up(t, &t->marks[t->at_marks], err);
    return st == LSA_OK ? teacher_mark(t, LSA_GPU_STREAMS, err) : st;
}

lsa_status teacher_mark(lsa_gpu_teacher *t, lsa_gpu_stage stage, lsa_err *err) {
    teacher_marks *const m = &t->marks[t->at_marks];
    if (m->n == (int)(sizeof m->event / sizeof *m->event))
        LSA_RET_FAIL(LSA_E_BUG, "more stages than events for them");
    LSA_CUDA(cudaEventRecord(m->event[m->n], t->cs->stream));
    m->stage[m->n++] = stage;
    return LSA_OK;
}

lsa_status teacher_marks_collect(lsa_gpu_teacher *t, lsa_err *err) {
    lsa_status st = LSA_OK;
    for (teacher_marks &m : t->marks) LSA_TRY(sum_up(t, &m, err));
done:
    return st;
}
