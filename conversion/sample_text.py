# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""Text on which a conversion is verified: prose, code, tables, numbers and several scripts."""

TEXT = '''\
A river does not hurry, and yet everything is accomplished by it. In spring it carries the snow of mountains
that nobody in the valley has ever climbed; in autumn it is so thin that children cross it on stones and come
home with dry feet. The miller said that he had never seen the same water twice. His daughter, who kept the
accounts, answered that she had billed it more than once.

"How many sacks?" she asked.
"Forty-two, less the three that got wet."
"Then thirty-nine, at 1.25 each: 48.75 in all, and we round nothing."

def moving_average(values: list[float], width: int) -> list[float]:
    """Means of all windows of `width` neighbours, in one pass."""
    if not 1 <= width <= len(values):
        raise ValueError(f"width is {width}; it must lie between 1 and {len(values)}")
    total = sum(values[:width])
    means = [total / width]
    for new, old in zip(values[width:], values):
        total += new - old
        means.append(total / width)
    return means

Theorem. There are infinitely many primes. Suppose that p_1, ..., p_n were all of them, and let m = p_1 * ... *
p_n + 1. Some prime divides m, and none of the list does, since each leaves the remainder 1. So the list was not
complete.

Der Zug nach Norden fährt um 7:18 Uhr von Gleis 4 ab. El último tren de la noche no espera a nadie. Le café est
froid, mais la conversation ne l'est pas. Поезд опаздывает на десять минут. 次の電車は三番線から出ます。

Dear Ms. Okafor, thank you for your letter of 3 May. We looked into the delay and found that the parcel had been
sorted twice, once by weight and once by colour, neither of which is written on it. It left this morning
(tracking number QX-7741-B) and should reach you by Thursday; please tell us if it does not. {"status": "sent",
"retries": 2, "ok": true}
'''
