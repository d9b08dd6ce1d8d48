/* Restricted unpickler: see pickle.h. A stack machine over values in one array; containers are chains of
 * links, so a container that holds itself is only a loop of numbers that nobody follows. A plain pickle holds
 * each storage as bytes that are five small pickles and the numbers: a second machine, which knows no such
 * bytes itself, reads those.
 *
 * The mistake that would stay silent: strides. A transposed or expanded tensor has the shape and the size of
 * a good one, so only contiguous tensors pass. */
#include "data/pickle.h"

#include <stdbool.h>
#include <stdio.h>
#include <string.h>

#include "kernels/core/mem.h"
#include "kernels/core/num.h"

typedef enum kind {
    K_MARK,
    K_NONE,
    K_BOOL,
    K_INT,
    K_FLOAT,
    K_TEXT,
    K_BYTES,
    K_TUPLE,
    K_LIST,
    K_DICT,
    K_DICT_TYPE,    /* collections.OrderedDict */
    K_REBUILD,      /* torch._utils._rebuild_tensor_v2 */
    K_LOAD_BYTES,   /* torch.storage._load_from_bytes */
    K_STORAGE_TYPE, /* torch.*Storage */
    K_STORAGE,
    K_TENSOR
} kind;

typedef struct value {
    kind k;
    int32_t first,
        last;      /* links: elements; key, value, key, value of a dict; offset, shape, stride of a tensor */
    int32_t of;    /* storage of a tensor; key of a storage */
    int64_t i;     /* int, bool; size of a text or of bytes; elements of a container or storage */
    const char *s; /* text, not terminated; bytes; content of a storage that is in the pickle, else NULL */
    lsa_dtype t;   /* storage type, storage */
} value;

typedef struct link {
    int32_t v, next;
} link;

/* Whose pickle it is, and so what may be in it. */
typedef enum origin {
    ARCHIVE, /* data.pkl of a torch.save archive: storages are entries of the archive */
    PLAIN,   /* pickle.dump: storages are bytes */
    INNER    /* inside those bytes */
} origin;

typedef struct machine {
    const unsigned char *p;
    size_t n, at;
    const char *where;
    origin from;
    LSA_VEC(value) val;
    LSA_VEC(link) link;
    LSA_VEC(int32_t) stack;
    LSA_VEC(int32_t) memo; /* 0: unset, else value + 1 */
} machine;

#define MAX_ENTRIES 8192 /* of the dict: the check for equal names is quadratic */
#define REFUSE(...) LSA_RET_FAIL(LSA_E_FORMAT, __VA_ARGS__)

static lsa_status need(const machine *m, size_t n, lsa_err *err) {
    if (n > m->n - m->at) REFUSE("%s: the pickle ends inside an opcode: truncated", m->where);
    return LSA_OK;
}

/* The next `width` bytes, little-endian. */
static lsa_status take(uint64_t *out, machine *m, int width, lsa_err *err) {
    const lsa_status st = need(m, (size_t)width, err);
    *out = 0;
    if (st != LSA_OK) return st;
    for (int i = width; i-- > 0;) *out = *out << 8 | m->p[m->at + (size_t)i];
    m->at += (size_t)width;
    return LSA_OK;
}

static lsa_status new_value(int32_t *out, machine *m, value v, lsa_err *err) {
    *out = 0;
    const lsa_status st = LSA_VEC_RESERVE(m->val, m->val.len + 1, err);
    if (st != LSA_OK) return st;
    if (m->val.len >= INT32_MAX - 1) REFUSE("%s: the pickle holds too many values", m->where);
    v.first = v.last = -1;
    *out = (int32_t)m->val.len;
    m->val.data[m->val.len++] = v;
    return LSA_OK;
}

static lsa_status push(machine *m, int32_t v, lsa_err *err) {
    const lsa_status st = LSA_VEC_RESERVE(m->stack, m->stack.len + 1, err);
    if (st == LSA_OK) m->stack.data[m->stack.len++] = v;
    return st;
}

static lsa_status push_new(machine *m, value v, lsa_err *err) {
    int32_t i;
    const lsa_status st = new_value(&i, m, v, err);
    return st == LSA_OK ? push(m, i, err) : st;
}

static lsa_status append(machine *m, int32_t to, int32_t v, lsa_err *err) {
    const lsa_status st = LSA_VEC_RESERVE(m->link, m->link.len + 1, err);
    if (st != LSA_OK) return st;
    if (m->link.len >= INT32_MAX - 1) REFUSE("%s: the pickle holds too many values", m->where);
    const int32_t i = (int32_t)m->link.len++;
    m->link.data[i] = (link){v, -1};
    value *c = &m->val.data[to];
    if (c->first < 0)
        c->first = i;
    else
        m->link.data[c->last].next = i;
    c->last = i;
    c->i++;
    return LSA_OK;
}

/* Takes the top n values off; *base: where they were. None of them may be a mark. */
static lsa_status pop(int64_t *base, machine *m, int64_t n, lsa_err *err) {
    *base = 0;
    if (m->stack.len < n) REFUSE("%s: the pickle takes from an empty stack", m->where);
    *base = m->stack.len - n;
    for (int64_t i = *base; i < m->stack.len; i++)
        if (m->val.data[m->stack.data[i]].k == K_MARK) REFUSE("%s: the pickle misplaces a mark", m->where);
    m->stack.len = *base;
    return LSA_OK;
}

/* Takes everything above the last mark and the mark off; the values are stack.data[*base .. *base + *n). */
static lsa_status pop_mark(int64_t *base, int64_t *n, machine *m, lsa_err *err) {
    *base = *n = 0;
    int64_t i = m->stack.len;
    while (i > 0 && m->val.data[m->stack.data[i - 1]].k != K_MARK) i--;
    if (i == 0) REFUSE("%s: the pickle closes what it never opened", m->where);
    *base = i, *n = m->stack.len - i;
    m->stack.len = i - 1;
    return LSA_OK;
}

static lsa_status make_tuple(machine *m, int64_t base, int64_t n, lsa_err *err) {
    int32_t t;
    lsa_status st = new_value(&t, m, (value){.k = K_TUPLE}, err);
    for (int64_t i = 0; st == LSA_OK && i < n; i++) st = append(m, t, m->stack.data[base + i], err);
    return st == LSA_OK ? push(m, t, err) : st;
}

/* Adds stack.data[base .. base+n) to the container of kind k on top of the stack. */
static lsa_status extend(machine *m, kind k, int64_t base, int64_t n, lsa_err *err) {
    lsa_status st = LSA_OK;
    if (m->stack.len == 0 || m->val.data[m->stack.data[m->stack.len - 1]].k != k || (k == K_DICT && n % 2))
        REFUSE("%s: the pickle adds to something that is not a %s", m->where, k == K_DICT ? "dict" : "list");
    const int32_t to = m->stack.data[m->stack.len - 1];
    for (int64_t i = 0; st == LSA_OK && i < n; i++) st = append(m, to, m->stack.data[base + i], err);
    return st;
}

static lsa_status push_global(machine *m, const char *module, const char *name, lsa_err *err) {
    static const struct {
        const char *name;
        lsa_dtype t;
    } storage[] = {{"Float", LSA_F32}, {"Half", LSA_F16},        {"BFloat16", LSA_BF16}, {"Double", LSA_F64},
                   {"Byte", LSA_U8},   {"Bool", LSA_U8},         {"Char", LSA_I8},       {"Int", LSA_I32},
                   {"Long", LSA_I64},  {"ComplexFloat", LSA_C64}};
    if (!strcmp(module, "collections") && !strcmp(name, "OrderedDict"))
        return push_new(m, (value){.k = K_DICT_TYPE}, err);
    if (!strcmp(module, "torch._utils") && !strcmp(name, "_rebuild_tensor_v2"))
        return push_new(m, (value){.k = K_REBUILD}, err);
    if (m->from == PLAIN && !strcmp(module, "torch.storage") && !strcmp(name, "_load_from_bytes"))
        return push_new(m, (value){.k = K_LOAD_BYTES}, err);
    for (size_t i = 0; i < sizeof storage / sizeof *storage && !strcmp(module, "torch"); i++) {
        char full[32];
        snprintf(full, sizeof full, "%sStorage", storage[i].name);
        if (!strcmp(name, full)) return push_new(m, (value){.k = K_STORAGE_TYPE, .t = storage[i].t}, err);
    }
    REFUSE(
        "%s: it asks for the Python object '%s.%s', which a dict of tensors does not need; nothing of the file was used: save "
        "%s",
        m->where, module, name, m->from == ARCHIVE ? "the state dict alone" : "tensors alone");
}

/* GLOBAL: two lines of text. */
static lsa_status read_global(machine *m, lsa_err *err) {
    char name[2][128];
    for (int i = 0; i < 2; i++) {
        const unsigned char *nl = memchr(m->p + m->at, '\n', m->n - m->at);
        const size_t len = nl ? (size_t)(nl - (m->p + m->at)) : sizeof name[i];
        if (len >= sizeof name[i]) REFUSE("%s: the pickle names a global without an end", m->where);
        memcpy(name[i], m->p + m->at, len);
        name[i][len] = 0;
        m->at += len + 1;
    }
    return push_global(m, name[0], name[1], err);
}

/* A name or storage key as a C string. */
static bool copy_text(char *out, size_t cap, const value *v) {
    if (v->k != K_TEXT || v->i < 1 || (size_t)v->i >= cap || memchr(v->s, 0, (size_t)v->i)) return false;
    memcpy(out, v->s, (size_t)v->i);
    out[v->i] = 0;
    return true;
}

/* STACK_GLOBAL: two texts from the stack. */
static lsa_status stack_global(machine *m, lsa_err *err) {
    char name[2][128];
    int64_t base;
    const lsa_status st = pop(&base, m, 2, err);
    if (st != LSA_OK) return st;
    for (int i = 0; i < 2; i++)
        if (!copy_text(name[i], sizeof name[i], &m->val.data[m->stack.data[base + i]]))
            REFUSE("%s: the pickle names a global by something that is not a name", m->where);
    return push_global(m, name[0], name[1], err);
}

/* The elements of container c into out[n]; false if it has another number of them. */
static bool elements(int32_t *out, const machine *m, int32_t c, int64_t n) {
    if (m->val.data[c].i != n) return false;
    int64_t i = 0;
    for (int32_t l = m->val.data[c].first; l >= 0 && i < n; l = m->link.data[l].next)
        out[i++] = m->link.data[l].v;
    return i == n;
}

/* ('storage', type, key, location, number of elements), inside bytes also a view of another: None */
static lsa_status push_storage(machine *m, lsa_err *err) {
    int64_t base;
    int32_t e[6];
    const int n = m->from == INNER ? 6 : 5;
    const lsa_status st = pop(&base, m, 1, err);
    if (st != LSA_OK) return st;
    const int32_t id = m->stack.data[base];
    const value *v = m->val.data;
    if (v[id].k != K_TUPLE || !elements(e, m, id, n) || v[e[0]].k != K_TEXT || v[e[0]].i != 7 ||
        memcmp(v[e[0]].s, "storage", 7) || v[e[1]].k != K_STORAGE_TYPE || v[e[2]].k != K_TEXT ||
        v[e[4]].k != K_INT || v[e[4]].i < 0 || (n == 6 && v[e[5]].k != K_NONE))
        REFUSE("%s: the pickle refers to something outside it that is not a tensor storage", m->where);
    return push_new(m, (value){.k = K_STORAGE, .t = v[e[1]].t, .of = e[2], .i = v[e[4]].i}, err);
}

static lsa_status load_bytes(machine *m, int32_t args, lsa_err *err);

static lsa_status reduce(machine *m, lsa_err *err) {
    int64_t base;
    lsa_status st = pop(&base, m, 2, err);
    if (st != LSA_OK) return st;
    const int32_t f = m->stack.data[base], args = m->stack.data[base + 1];
    const value *v = m->val.data;
    if (v[f].k == K_DICT_TYPE && v[args].k == K_TUPLE && v[args].i == 0)
        return push_new(m, (value){.k = K_DICT}, err);
    if (v[f].k == K_LOAD_BYTES) return load_bytes(m, args, err);
    if (v[f].k != K_REBUILD)
        REFUSE("%s: the pickle calls something that is not a known constructor", m->where);
    int32_t e[6], t; /* storage, offset, shape, stride, requires_grad, hooks */
    if (v[args].k != K_TUPLE || !elements(e, m, args, 6) || v[e[0]].k != K_STORAGE || v[e[1]].k != K_INT ||
        v[e[2]].k != K_TUPLE || v[e[3]].k != K_TUPLE)
        REFUSE("%s: the pickle builds a tensor from the wrong arguments", m->where);
    st = new_value(&t, m, (value){.k = K_TENSOR, .of = e[0]}, err);
    for (int i = 1; st == LSA_OK && i < 4; i++) st = append(m, t, e[i], err);
    return st == LSA_OK ? push(m, t, err) : st;
}

static lsa_status put_memo(machine *m, uint64_t i, lsa_err *err) {
    lsa_status st = LSA_OK;
    if (i >= m->n || m->stack.len == 0)
        REFUSE("%s: the pickle numbers a value wrongly", m->where); /* a byte each at least */
    st = LSA_VEC_RESERVE(m->memo, (int64_t)i + 1, err);
    if (st != LSA_OK) return st;
    for (; m->memo.len <= (int64_t)i; m->memo.len++) m->memo.data[m->memo.len] = 0;
    m->memo.data[i] = m->stack.data[m->stack.len - 1] + 1;
    return LSA_OK;
}

static lsa_status get_memo(machine *m, uint64_t i, lsa_err *err) {
    if (i >= (uint64_t)m->memo.len || m->memo.data[i] == 0)
        REFUSE("%s: the pickle asks for a value it never kept", m->where);
    return push(m, m->memo.data[i] - 1, err);
}

/* Signed integer of n bytes, at most 8. */
static lsa_status push_long(machine *m, int n, lsa_err *err) {
    uint64_t u;
    if (n > 8) REFUSE("%s: the pickle holds an integer of %d bytes", m->where, n);
    const lsa_status st = take(&u, m, n, err);
    if (st != LSA_OK) return st;
    if (n > 0 && n < 8 && (u >> (8 * n - 1) & 1)) u |= ~UINT64_C(0) << (8 * n);
    int64_t i;
    memcpy(&i, &u, sizeof i);
    return push_new(m, (value){.k = K_INT, .i = i}, err);
}

/* Text or bytes behind their size, which has `width` bytes. */
static lsa_status push_span(machine *m, kind k, int width, lsa_err *err) {
    uint64_t u;
    lsa_status st = take(&u, m, width, err);
    if (st == LSA_OK && u > m->n - m->at) REFUSE("%s: the pickle ends inside a value: truncated", m->where);
    if (st != LSA_OK) return st;
    st = push_new(m, (value){.k = k, .i = (int64_t)u, .s = (const char *)m->p + m->at}, err);
    m->at += (size_t)u;
    return st;
}

/* Opcodes of the protocols after 2. */
static lsa_status step_new(bool *known, machine *m, int op, lsa_err *err) {
    uint64_t u;
    *known = true;
    switch (op) {
    case 'C':
    case 'B':
    case 0x8e:
        return push_span(m, K_BYTES, op == 'C' ? 1 : op == 'B' ? 4 : 8, err);
    case 0x8c:
    case 0x8d:
        return push_span(m, K_TEXT, op == 0x8c ? 1 : 8, err);
    case 0x93:
        return stack_global(m, err);
    case 0x94: /* MEMOIZE: the next number */
        return put_memo(m, (uint64_t)m->memo.len, err);
    case 0x95: /* FRAME: a hint for readers of streams */
        return take(&u, m, 8, err);
    default:
        *known = false;
        return LSA_OK;
    }
}

/* One opcode; *stop at the end. */
static lsa_status step(machine *m, bool *stop, lsa_err *err) {
    lsa_status st = LSA_OK;
    uint64_t u;
    int64_t base, n;
    LSA_TRY(take(&u, m, 1, err));
    const int op = (int)u;
    switch (op) {
    case 0x80: /* PROTO */
        LSA_TRY(take(&u, m, 1, err));
        if (m->from != PLAIN && u != 2)
            LSA_FAIL(LSA_E_UNSUPPORTED, "%s: pickle protocol %d, torch.save writes 2", m->where, (int)u);
        if (u < 2 || u > 5)
            LSA_FAIL(LSA_E_UNSUPPORTED, "%s: pickle protocol %d, 2 to 5 are read", m->where, (int)u);
        break;
    case '.':
        *stop = true;
        break;
    case '(':
        LSA_TRY(push_new(m, (value){.k = K_MARK}, err));
        break;
    case 'N':
        LSA_TRY(push_new(m, (value){.k = K_NONE}, err));
        break;
    case 0x88:
    case 0x89:
        LSA_TRY(push_new(m, (value){.k = K_BOOL, .i = op == 0x88}, err));
        break;
    case 'K':
    case 'M': /* unsigned, 1 or 2 bytes */
        LSA_TRY(take(&u, m, op == 'K' ? 1 : 2, err));
        LSA_TRY(push_new(m, (value){.k = K_INT, .i = (int64_t)u}, err));
        break;
    case 'J':
        LSA_TRY(push_long(m, 4, err));
        break;
    case 0x8a: /* LONG1 */
        LSA_TRY(take(&u, m, 1, err));
        LSA_TRY(push_long(m, (int)u, err));
        break;
    case 'G':
        LSA_TRY(take(&u, m, 8, err));
        LSA_TRY(push_new(m, (value){.k = K_FLOAT}, err));
        break;
    case 'X':
        LSA_TRY(push_span(m, K_TEXT, 4, err));
        break;
    case ')':
        LSA_TRY(push_new(m, (value){.k = K_TUPLE}, err));
        break;
    case ']':
        LSA_TRY(push_new(m, (value){.k = K_LIST}, err));
        break;
    case '}':
        LSA_TRY(push_new(m, (value){.k = K_DICT}, err));
        break;
    case 't':
        LSA_TRY(pop_mark(&base, &n, m, err));
        LSA_TRY(make_tuple(m, base, n, err));
        break;
    case 0x85:
    case 0x86:
    case 0x87:
        LSA_TRY(pop(&base, m, op - 0x84, err));
        LSA_TRY(make_tuple(m, base, op - 0x84, err));
        break;
    case 'a':
    case 's':
        n = op == 'a' ? 1 : 2;
        LSA_TRY(pop(&base, m, n, err));
        LSA_TRY(extend(m, op == 'a' ? K_LIST : K_DICT, base, n, err));
        break;
    case 'e':
    case 'u':
        LSA_TRY(pop_mark(&base, &n, m, err));
        LSA_TRY(extend(m, op == 'e' ? K_LIST : K_DICT, base, n, err));
        break;
    case 'b': /* BUILD: attributes of an OrderedDict (a state dict's _metadata), not needed */
        LSA_TRY(pop(&base, m, 1, err));
        if (m->stack.len == 0 || m->val.data[m->stack.data[m->stack.len - 1]].k != K_DICT)
            LSA_FAIL(LSA_E_FORMAT, "%s: the pickle sets attributes of something that is not a dict",
                     m->where);
        break;
    case 'c':
        LSA_TRY(read_global(m, err));
        break;
    case 'R':
        LSA_TRY(reduce(m, err));
        break;
    case 'Q':
        if (m->from == PLAIN)
            LSA_FAIL(LSA_E_FORMAT, "%s: the pickle refers to something outside it", m->where);
        LSA_TRY(push_storage(m, err));
        break;
    case 'q':
    case 'r':
        LSA_TRY(take(&u, m, op == 'q' ? 1 : 4, err));
        LSA_TRY(put_memo(m, u, err));
        break;
    case 'h':
    case 'j':
        LSA_TRY(take(&u, m, op == 'h' ? 1 : 4, err));
        LSA_TRY(get_memo(m, u, err));
        break;
    default:
        if (m->from == PLAIN) {
            bool known;
            LSA_TRY(step_new(&known, m, op, err));
            if (known) break;
        }
        LSA_FAIL(LSA_E_FORMAT, "%s: pickle opcode 0x%02x at byte %zu has no place in a dict of tensors",
                 m->where, op, m->at - 1);
    }
done:
    return st;
}

/* Runs one pickle; *top is its value. */
static lsa_status run(int32_t *top, machine *m, lsa_err *err) {
    lsa_status st = LSA_OK;
    *top = 0;
    m->stack.len = m->memo.len = 0;
    for (bool stop = false; !stop;) LSA_TRY(step(m, &stop, err));
    if (m->stack.len != 1) LSA_FAIL(LSA_E_FORMAT, "%s: the pickle does not end with one value", m->where);
    *top = m->stack.data[0];
done:
    return st;
}

/* The value under `name` of dict d; NULL if absent. */
static const value *entry(const machine *m, int32_t d, const char *name) {
    char key[32];
    for (int32_t l = m->val.data[d].first; l >= 0; l = m->link.data[m->link.data[l].next].next)
        if (copy_text(key, sizeof key, &m->val.data[m->link.data[l].v]) && !strcmp(key, name))
            return &m->val.data[m->link.data[m->link.data[l].next].v];
    return NULL;
}

static void machine_fini(machine *m) {
    lsa_free(m->val.data);
    lsa_free(m->link.data);
    lsa_free(m->stack.data);
    lsa_free(m->memo.data);
}

/* torch's stream of one storage: magic number, protocol version, sizes of the writer's types, the storage,
 * the list of keys, then its element count as i64 and its bytes. *out gets type, count and content. */
static lsa_status read_stream(value *out, machine *m, lsa_err *err) {
    static const unsigned char magic[] = "\x80\2\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.";
    lsa_status st = LSA_OK;
    int32_t top, key;
    uint64_t count;
    int64_t n_bytes = 0;
    if (m->n < sizeof magic - 1 || memcmp(m->p, magic, sizeof magic - 1))
        LSA_FAIL(LSA_E_FORMAT, "%s: the bytes of a storage do not begin as torch writes them", m->where);
    m->at = sizeof magic - 1;
    LSA_TRY(run(&top, m, err));
    if (m->val.data[top].k != K_INT || m->val.data[top].i != 1001)
        LSA_FAIL(LSA_E_UNSUPPORTED, "%s: a storage of another protocol than 1001", m->where);
    LSA_TRY(run(&top, m, err));
    const value *little = m->val.data[top].k == K_DICT ? entry(m, top, "little_endian") : NULL;
    if (!little || little->k != K_BOOL || !little->i)
        LSA_FAIL(LSA_E_UNSUPPORTED, "%s: written on a big-endian machine", m->where);
    LSA_TRY(run(&top, m, err));
    if (m->val.data[top].k != K_STORAGE) LSA_FAIL(LSA_E_FORMAT, "%s: bytes without a storage", m->where);
    *out = m->val.data[top];
    const int32_t want = out->of;
    LSA_TRY(run(&top, m, err));
    if (m->val.data[top].k != K_LIST || !elements(&key, m, top, 1) || m->val.data[key].k != K_TEXT ||
        m->val.data[key].i != m->val.data[want].i ||
        memcmp(m->val.data[key].s, m->val.data[want].s, (size_t)m->val.data[key].i))
        LSA_FAIL(LSA_E_FORMAT, "%s: bytes that do not hold exactly one storage", m->where);
    LSA_TRY(take(&count, m, 8, err));
    if (count != (uint64_t)out->i || !lsa_mul_i64(out->i, (int64_t)lsa_dtype_bytes(out->t), &n_bytes) ||
        (uint64_t)n_bytes != m->n - m->at)
        LSA_FAIL(LSA_E_FORMAT, "%s: a storage of %lld elements of %s, but its bytes are %llu, %zu of them",
                 m->where, (long long)out->i, lsa_dtype_name(out->t), (unsigned long long)count,
                 m->n - m->at);
    out->s = (const char *)m->p + m->at;
done:
    return st;
}

/* Takes the bytes of a storage for the storage. */
static lsa_status load_bytes(machine *m, int32_t args, lsa_err *err) {
    int32_t e;
    value v = {0};
    if (m->val.data[args].k != K_TUPLE || !elements(&e, m, args, 1) || m->val.data[e].k != K_BYTES)
        REFUSE("%s: the pickle loads a storage from something that is not bytes", m->where);
    machine in = {.p = (const unsigned char *)m->val.data[e].s,
                  .n = (size_t)m->val.data[e].i,
                  .where = m->where,
                  .from = INNER};
    lsa_status st = read_stream(&v, &in, err);
    machine_fini(&in);
    v.of = 0;
    m->val.data[e].k = K_NONE; /* once: reading the same bytes again and again would not be linear */
    return st == LSA_OK ? push_new(m, v, err) : st;
}

static lsa_status read_tensor(lsa_pickle_tensor *t, const machine *m, int32_t at, lsa_err *err) {
    const value *v = m->val.data, *s = &v[v[at].of];
    int32_t part[3], shape[LSA_PICKLE_MAX_DIM], stride[LSA_PICKLE_MAX_DIM];
    if (!elements(part, m, at, 3) || v[part[1]].i > LSA_PICKLE_MAX_DIM || v[part[2]].i != v[part[1]].i)
        REFUSE("%s: tensor '%s': more than %d dimensions, or as many strides as sizes it has not", m->where,
               t->name, LSA_PICKLE_MAX_DIM);
    t->data = (const unsigned char *)s->s;
    if (!t->data && (!copy_text(t->storage, sizeof t->storage, &v[s->of]) || strchr(t->storage, '/')))
        REFUSE("%s: tensor '%s': its storage has no usable key", m->where, t->name);
    t->dtype = s->t, t->storage_n = s->i, t->offset = v[part[0]].i;
    t->n_dim = (int32_t)v[part[1]].i, t->n_elem = 1;
    if (!elements(shape, m, part[1], t->n_dim) || !elements(stride, m, part[2], t->n_dim))
        REFUSE("%s: tensor '%s': bad shape", m->where, t->name);
    for (int32_t i = t->n_dim; i-- > 0;) { /* the last dimension is the densest */
        const value *n = &v[shape[i]], *d = &v[stride[i]];
        if (n->k != K_INT || d->k != K_INT || n->i < 0)
            REFUSE("%s: tensor '%s': size %d is not a count of elements", m->where, t->name, i);
        if (n->i > 1 && t->n_elem > 0 && d->i != t->n_elem)
            REFUSE(
                "%s: tensor '%s' is not contiguous (stride %lld of dimension %d, expected %lld): call .contiguous() before "
                "saving",
                m->where, t->name, (long long)d->i, i, (long long)t->n_elem);
        t->shape[i] = n->i;
        if (!lsa_mul_i64(t->n_elem, n->i, &t->n_elem))
            REFUSE("%s: tensor '%s': shape overflows", m->where, t->name);
    }
    if (t->offset < 0 || t->offset > s->i || t->n_elem > s->i - t->offset)
        REFUSE("%s: tensor '%s': %lld elements from %lld leave its storage of %lld", m->where, t->name,
               (long long)t->n_elem, (long long)t->offset, (long long)s->i);
    return LSA_OK;
}

static lsa_status collect(lsa_pickle_tensor **out, int64_t *n, const machine *m, int32_t top, lsa_err *err) {
    lsa_status st = LSA_OK;
    if (m->val.data[top].k != K_DICT) LSA_FAIL(LSA_E_FORMAT, "%s: expected a dict of tensors", m->where);
    const value *inner = m->from == ARCHIVE ? entry(m, top, "model_state") : NULL;
    const int32_t d = inner && inner->k == K_DICT ? (int32_t)(inner - m->val.data) : top;
    if (m->val.data[d].i / 2 > MAX_ENTRIES)
        LSA_FAIL(LSA_E_FORMAT, "%s: the dict has %lld entries, at most %d are read", m->where,
                 (long long)m->val.data[d].i / 2, MAX_ENTRIES);
    LSA_TRY(LSA_NEW(*out, m->val.data[d].i / 2, err));
    for (int32_t l = m->val.data[d].first; l >= 0; l = m->link.data[m->link.data[l].next].next) {
        const int32_t v = m->link.data[m->link.data[l].next].v;
        lsa_pickle_tensor *t = &(*out)[*n];
        if (m->val.data[v].k != K_TENSOR) continue;
        if (!copy_text(t->name, sizeof t->name, &m->val.data[m->link.data[l].v]))
            LSA_FAIL(LSA_E_FORMAT, "%s: a tensor's key is not a name of at most %zu bytes", m->where,
                     sizeof t->name - 1);
        LSA_TRY(read_tensor(t, m, v, err));
        ++*n;
    }
    if (*n == 0)
        LSA_FAIL(
            LSA_E_FORMAT,
            "%s: the dict holds no tensor: expected name -> tensor, or a dict of them under 'model_state'",
            m->where);
    for (int64_t i = 0; i < *n; i++)
        for (int64_t k = 0; k < i; k++)
            if (!strcmp((*out)[i].name, (*out)[k].name))
                LSA_FAIL(LSA_E_FORMAT, "%s: tensor '%s' is there twice", m->where, (*out)[i].name);
done:
    return st;
}

static lsa_status read_all(lsa_pickle_tensor **out, int64_t *n, machine *m, lsa_err *err) {
    lsa_status st = LSA_OK;
    int32_t top;
    *out = NULL, *n = 0;
    LSA_TRY(run(&top, m, err));
    LSA_TRY(collect(out, n, m, top, err));
done:
    machine_fini(m);
    if (st != LSA_OK) {
        lsa_free(*out);
        *out = NULL, *n = 0;
    }
    return st;
}

lsa_status lsa_pickle_tensors(lsa_pickle_tensor **out, int64_t *n, const void *data, size_t n_bytes,
                              const char *where, lsa_err *err) {
    machine m = {.p = data, .n = n_bytes, .where = where, .from = ARCHIVE};
    return read_all(out, n, &m, err);
}

lsa_status lsa_pickle_plain(lsa_pickle_tensor **out, int64_t *n, const void *data, size_t n_bytes,
                            const char *where, lsa_err *err) {
    machine m = {.p = data, .n = n_bytes, .where = where, .from = PLAIN};
    return read_all(out, n, &m, err);
}
