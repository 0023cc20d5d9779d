"""The variable-length codes of H.264's CAVLC, and the fewest bits with which a block can be ended."""

from __future__ import annotations

import functools

__all__ = ["INTER_PATTERNS", "number", "runs_leaves", "signed", "token_leaves", "zeros_leaves", "zeros_rest"]

# ITU-T H.264, table 9-5: codes of (coefficients, ones at their end), (0, 0); (1, 0), (1, 1); (2, 0), ... with up to three ones;
# for 0 or 1, 2 or 3, and 4 to 7 coefficients expected, and for the constant parts of colours.
COEFF_TOKENS = (
    """
    1 000101 01 00000111 000100 001 000000111 00000110 0000101 00011 0000000111 000000110 00000101 000011 00000000111
    0000000110 000000101 0000100 0000000001111 00000000110 0000000101 00000100 0000000001011 0000000001110 00000000101
    000000100 0000000001000 0000000001010 0000000001101 0000000100 00000000001111 00000000001110 0000000001001 00000000100
    00000000001011 00000000001010 00000000001101 0000000001100 000000000001111 000000000001110 00000000001001 00000000001100
    000000000001011 000000000001010 000000000001101 00000000001000 0000000000001111 000000000000001 000000000001001
    000000000001100 0000000000001011 0000000000001110 0000000000001101 000000000001000 0000000000000111 0000000000001010
    0000000000001001 0000000000001100 0000000000000100 0000000000000110 0000000000000101 0000000000001000
    """,
    """
    11 001011 10 000111 00111 011 0000111 001010 001001 0101 00000111 000110 000101 0100 00000100 0000110 0000101 00110
    000000111 00000110 00000101 001000 00000001111 000000110 000000101 000100 00000001011 00000001110 00000001101 0000100
    000000001111 00000001010 00000001001 000000100 000000001011 000000001110 000000001101 00000001100 000000001000
    000000001010 000000001001 00000001000 0000000001111 0000000001110 0000000001101 000000001100 0000000001011 0000000001010
    0000000001001 0000000001100 0000000000111 00000000001011 0000000000110 0000000001000 00000000001001 00000000001000
    00000000001010 0000000000001 00000000000111 00000000000110 00000000000101 00000000000100
    """,
    """
    1111 001111 1110 001011 01111 1101 001000 01100 01110 1100 0001111 01010 01011 1011 0001011 01000 01001 1010 0001001
    001110 001101 1001 0001000 001010 001001 1000 00001111 0001110 0001101 01101 00001011 00001110 0001010 001100 000001111
    00001010 00001101 0001100 000001011 000001110 00001001 00001100 000001000 000001010 000001101 00001000 0000001101
    000000111 000001001 000001100 0000001001 0000001100 0000001011 0000001010 0000000101 0000001000 0000000111 0000000110
    0000000001 0000000100 0000000011 0000000010
    """,
    """
    01 000111 1 000100 000110 001 000011 0000011 0000010 000101 000010 00000011 00000010 0000000
    """,
)
# Tables 9-7 and 9-8: codes of zeros before the last coefficient, by number of coefficients, from 1.
TOTAL_ZEROS = (
    "1 011 010 0011 0010 00011 00010 000011 000010 0000011 0000010 00000011 00000010 000000011 000000010 000000001",
    "111 110 101 100 011 0101 0100 0011 0010 00011 00010 000011 000010 000001 000000",
    "0101 111 110 101 0100 0011 100 011 0010 00011 00010 000001 00001 000000",
    "00011 111 0101 0100 110 101 100 0011 011 0010 00010 00001 00000",
    "0101 0100 0011 111 110 101 100 011 0010 00001 0001 00000",
    "000001 00001 111 110 101 100 011 010 0001 001 000000",
    "000001 00001 101 100 011 11 010 0001 001 000000",
    "000001 0001 00001 011 11 10 010 001 000000",
    "000001 000000 0001 11 10 001 01 00001",
    "00001 00000 001 11 10 01 0001",
    "0000 0001 001 010 1 011",
    "0000 0001 01 1 001",
    "000 001 1 01",
    "00 01 1",
    "0 1",
)
CHROMA_TOTAL_ZEROS = (
    "1 01 001 000",
    "1 01 00",
    "1 0",
)
# Table 9-10: codes of zeros before a coefficient, by zeros that are left, from 1; the last row is of 7 and more.
RUNS = (
    "1 0",
    "1 01 00",
    "11 10 01 00",
    "11 10 01 001 000",
    "11 10 011 010 001 000",
    "11 000 001 011 010 101 100",
    "111 110 101 100 011 010 001 0001 00001 000001 0000001 00000001 000000001 0000000001 00000000001",
)

# Table 9-4: which blocks of a predicted macroblock have coefficients, by number of the code: 4 bits of brightness, and 16 for the
# constant parts of colours or 32 for all of them.
INTER_PATTERNS = (
    *(0, 16, 1, 2, 4, 8, 32, 3, 5, 10, 12, 15, 47, 7, 11, 13, 14, 6, 9, 31, 35, 37, 42, 44),
    *(33, 34, 36, 40, 39, 43, 45, 46, 17, 18, 20, 24, 19, 21, 26, 28, 23, 27, 29, 30, 22, 25, 38, 41),
)


def number(n: int) -> str:
    """The exponential Golomb code of a number without a sign (9.1)."""
    digits = format(n + 1, "b")
    return "0" * (len(digits) - 1) + digits


def signed(n: int) -> str:
    """The code of a number with a sign (9.1.1)."""
    return number(2 * n - 1 if n > 0 else -2 * n)


def token_leaves(kind: int, most: int) -> list[tuple[str, int, int]]:
    """Leaves of the codes that begin a block of at most `most` coefficients; a symbol is 4 coefficients + ones.

    Args:
      kind: 0 to 2 as in the table, 3 for eight and more expected, 4 for the constant parts of colours.
      most: 16, 15 or 4.
    """
    pairs = [(total, ones) for total in range(17) for ones in range(min(total, 3) + 1)]
    if kind == 3:
        codes = ["000011", *(format(4 * (total - 1) + ones, "06b") for total, ones in pairs[1:])]
    else:
        codes = COEFF_TOKENS[min(kind, 3)].split()
    known = [(code, total, ones) for code, (total, ones) in zip(codes, pairs) if total <= most]
    return [(code, 4 * total + ones, block_rest(total, ones, most)) for code, total, ones in known]


def block_rest(total: int, ones: int, most: int) -> int:
    """Fewest bits of a block behind its first code: signs, values, and places."""
    values = total - ones
    suffix = total > 10 and ones < 3
    return ones + (values and 1 + suffix + 2 * (values - 1)) + zeros_rest(total, most)


@functools.cache
def zeros_rest(total: int, most: int) -> int:
    """Fewest bits that say where the coefficients of a block are."""
    leaves = zeros_leaves(total, most) if 0 < total < most else ()
    return min((len(code) + after for code, _, after in leaves), default=0)


def zeros_leaves(total: int, most: int) -> list[tuple[str, int, int]]:
    """Leaves of the codes of zeros among `most` coefficients."""
    codes = (CHROMA_TOTAL_ZEROS if most == 4 else TOTAL_ZEROS)[total - 1].split()
    return [(code, zeros, runs_rest(zeros, total - 1)) for zeros, code in enumerate(codes) if zeros <= most - total]


@functools.cache
def runs_rest(zeros: int, runs: int) -> int:
    """Fewest bits that share zeros out among the coefficients behind them."""
    return min((len(code) + after for code, _, after in runs_leaves(zeros, runs)), default=0) if zeros and runs else 0


def runs_leaves(zeros: int, runs: int) -> list[tuple[str, int, int]]:
    """Leaves of the codes of zeros before one coefficient; `runs` such codes are the most that may come."""
    codes = RUNS[min(zeros, 7) - 1].split()
    return [(code, run, runs_rest(zeros - run, runs - 1)) for run, code in enumerate(codes) if run <= zeros]
