"""XXH64 with seed 0, written from its public description, so that tests can forge files whose checksums hold."""
import struct

P1, P2, P3, P4, P5 = 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5
M = (1 << 64) - 1


def _rot(x, r):
    return (x << r | x >> (64 - r)) & M


def _round(acc, lane):
    return _rot((acc + lane * P2) & M, 31) * P1 & M


def xxh64(data):
    data, at, n = bytes(data), 0, len(data)
    if n >= 32:
        v = [(P1 + P2) & M, P2, 0, -P1 & M]
        while at + 32 <= n:
            v = [_round(a, lane) for a, lane in zip(v, struct.unpack_from("<4Q", data, at))]
            at += 32
        h = (_rot(v[0], 1) + _rot(v[1], 7) + _rot(v[2], 12) + _rot(v[3], 18)) & M
        for a in v:
            h = ((h ^ _round(0, a)) * P1 + P4) & M
    else:
        h = P5
    h = (h + n) & M
    while at + 8 <= n:
        h = (_rot(h ^ _round(0, struct.unpack_from("<Q", data, at)[0]), 27) * P1 + P4) & M
        at += 8
    if at + 4 <= n:
        h = (_rot(h ^ struct.unpack_from("<I", data, at)[0] * P1 & M, 23) * P2 + P3) & M
        at += 4
    for b in data[at:]:
        h = _rot(h ^ b * P5 & M, 11) * P1 & M
    h = (h ^ h >> 33) * P2 & M
    h = (h ^ h >> 29) * P3 & M
    return h ^ h >> 32


assert xxh64(b"") == 0xEF46DB3751D8E999 and xxh64(b"abc") == 0x44BC2CF5AD770999
