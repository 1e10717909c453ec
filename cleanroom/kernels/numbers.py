"""Float32 functions that Triton lacks or only approximates, and keys that sort as floats do.

Written in plain arithmetic, so that they run on every backend and under the interpreter alike.
"""

import triton
import triton.language as tl

# Minimax polynomial of arctan(t) / t in t^2 on [0, tan(pi/8)] (Cody and Waite's reduction), error below 1 unit.
_A0 = tl.constexpr(-3.33329491539e-1)
_A1 = tl.constexpr(1.99777106478e-1)
_A2 = tl.constexpr(-1.38776856032e-1)
_A3 = tl.constexpr(8.05374449538e-2)
_TAN_PI_8 = tl.constexpr(0.4142135623730950)
_TAN_3PI_8 = tl.constexpr(2.414213562373095)
_HALF_PI = tl.constexpr(1.5707963267948966)
_QUARTER_PI = tl.constexpr(0.7853981633974483)

# Minimax polynomial of log(1 + x) / x on [0, 1], relative error 3e-8.
_L0 = tl.constexpr(0.9999999403953552)
_L1 = tl.constexpr(-0.4999949336051941)
_L2 = tl.constexpr(0.3331909775733948)
_L3 = tl.constexpr(-0.2484298050403595)
_L4 = tl.constexpr(0.19106000661849976)
_L5 = tl.constexpr(-0.13663232326507568)
_L6 = tl.constexpr(0.07822578400373459)
_L7 = tl.constexpr(-0.029505137354135513)
_L8 = tl.constexpr(0.005232668947428465)


@triton.jit
def atan(x):
    """Arc tangent of float32, within 2 units in the last place; NaN stays, infinity gives pi / 2."""
    a = tl.abs(x)
    steep = a > _TAN_3PI_8
    middle = (a > _TAN_PI_8) & (a <= _TAN_3PI_8)
    t = tl.where(steep, tl.div_rn(-1.0, a), a)
    t = tl.where(middle, tl.div_rn(a - 1.0, a + 1.0), t)
    base = tl.where(steep, _HALF_PI, tl.where(middle, _QUARTER_PI, 0.0))
    z = t * t
    found = base + ((((_A3 * z + _A2) * z + _A1) * z + _A0) * z * t + t)
    return tl.where(x < 0, -found, found)


@triton.jit
def log1p(x):
    """``log(1 + x)`` of float32 x > -1, all digits kept near 0 (Kahan's correction); -1 gives -infinity."""
    u = 1.0 + x
    near = u == 1.0
    away = tl.where(near, 1.0, u - 1.0)
    return tl.where(near, x, tl.where(u == float("inf"), u, tl.log(u) * tl.div_rn(x, away)))


@triton.jit
def log1p_unit(x):
    """``log(1 + x)`` of float32 x in [0, 1], error below 2e-7 of it: eight multiply-adds, half of `log1p`."""
    high = ((_L8 * x + _L7) * x + _L6) * x + _L5
    return x * (((((high * x + _L4) * x + _L3) * x + _L2) * x + _L1) * x + _L0)


@triton.jit
def sigmoid(x):
    """``1 / (1 + exp(-x))`` of float32, rounded division, no overflow on either side."""
    small = tl.exp(-tl.abs(x))
    return tl.div_rn(tl.where(x >= 0, 1.0, small), 1.0 + small)


@triton.jit
def softplus(x):
    """``log(1 + exp(x))`` of float32: infinite x gives x or 0."""
    return tl.maximum(x, 0.0) + log1p(tl.exp(-tl.abs(x)))


@triton.jit
def ordered_bits(x):
    """Float32 as uint32 of the same order, from -infinity to infinity; -0 counts as 0. NaN is the caller's affair."""
    bits = (x + 0.0).to(tl.uint32, bitcast=True)
    return tl.where(bits >> 31 != 0, ~bits, bits | 0x80000000)


@triton.jit
def from_ordered_bits(key):
    """What `ordered_bits` made the key of."""
    bits = tl.where(key >> 31 != 0, key & 0x7FFFFFFF, ~key)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def round_bfloat16(x):
    """Float32 rounded to a bfloat16, ties to even, still float32: the cast that follows is exact everywhere.

    The interpreter's own cast truncates.
    """
    bits = x.to(tl.uint32, bitcast=True)
    even = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return tl.where(tl.abs(x) <= float("inf"), even.to(tl.float32, bitcast=True), x)


@triton.jit
def cast(x, dtype: tl.constexpr):
    """Float32 as another float type, rounded to nearest, ties to even, under the interpreter too."""
    return round_bfloat16(x).to(dtype) if dtype == tl.bfloat16 else x.to(dtype)
