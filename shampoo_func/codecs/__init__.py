"""How leaves of a state are stored between two steps: exact, rounded, or in few bits."""

from shampoo_func.codecs.bfloat16 import Bfloat16Code, Bfloat16Codec, bfloat16_codec
from shampoo_func.codecs.codec import ROLES, Codec
from shampoo_func.codecs.eight_bit import EightBit, eight_bit
from shampoo_func.codecs.four_bit_cholesky import FourBitCholesky, four_bit_cholesky
from shampoo_func.codecs.four_bit_eigen import FourBitEigen, four_bit_eigen
from shampoo_func.codecs.packing import PackedCode, SymmetricPacking, symmetric_packing

__all__ = [
    "ROLES",
    "Bfloat16Code",
    "Bfloat16Codec",
    "Codec",
    "EightBit",
    "FourBitCholesky",
    "FourBitEigen",
    "PackedCode",
    "SymmetricPacking",
    "bfloat16_codec",
    "eight_bit",
    "four_bit_cholesky",
    "four_bit_eigen",
    "symmetric_packing",
]
