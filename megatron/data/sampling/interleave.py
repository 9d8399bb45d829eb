"""Order in which the datasets of a blend take turns.

Sample j of a dataset with share w must come between floor((j - 1) / w) and ceil(j / w): if all
samples keep these windows, every count stays within 1 of w * t. Among the samples whose window is
open, the one whose window closes first is taken. This earliest-deadline-first rule keeps all
windows whenever that is possible (unit jobs with release times and deadlines on one machine), and
shares that add up to 1 make it possible. Sorting by deadline alone, or taking the largest deficit,
drifts by more than 1 with several datasets.

Every step depends on the previous one. To use array operations all the same, the run is cut into
lanes that advance together, one step at a time, from a guess of their first state: before step t, a
dataset has given floor(w * t) or ceil(w * t) samples, so that only the datasets with the larger
number have to be guessed. A wrong guess changes few samples, because the wrong and the right
order soon meet. Where the end of a lane contradicts the guess of the next one, samples are chosen
again one by one until they meet, so that the result does not depend on the guesses.

Shape suffixes: K datasets, L lanes, S steps of a lane.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

_MAX_LANE_DATASETS = 192
"""With more datasets, choosing one sample at a time with a heap is faster."""
_LANE_ELEMENTS = 1 << 15
"""Datasets times lanes, whose state should stay in the CPU's cache."""
_MAX_LANES = 4096
_LANE_STEPS = 2048
_MAX_INT = 1 << 62
"""Bound of all numbers in lanes, which are int64; larger ones are left to Python's integers."""


@dataclass
class _State:
    """For each dataset, the window of its next sample; lists or arrays of the same shape.

    With T / u the reciprocal of the share and j the number of the sample, from 1.
    """

    opens: list[int] | np.ndarray
    """floor((j - 1) T / u), when the window opens"""
    floor: list[int] | np.ndarray
    """floor(j T / u), when the window of the sample after that opens"""
    residue: list[int] | np.ndarray
    """j T mod u; the window closes at `floor`, plus 1 unless this is 0"""

    def column(self, lane: int) -> _State:
        """Return the state of one lane of [K, L] arrays, as lists."""
        return _State(*(array[:, lane].tolist() for array in vars(self).values()))

    def set_column(self, lane: int, state: _State) -> None:
        """Set the state of one lane."""
        for array, values in zip(vars(self).values(), vars(state).values()):
            array[:, lane] = values

    def copy(self) -> _State:
        return _State(*(array.copy() for array in vars(self).values()))


def interleave(units: Sequence[int], num_samples: int, tie_ranks: Sequence[int]) -> np.ndarray:
    """Choose a dataset for each sample such that every count stays within 1 of its share.

    Args:
        units: positive integers proportional to the shares; integers accumulate no rounding
            error.
        tie_ranks: permutation that decides between equal deadlines; the smallest rank comes
            first.

    Returns:
        uint16 [num_samples]: the dataset of each sample.
    """
    total = sum(units)
    choice = np.empty(num_samples, np.uint16)
    lanes = max(1, min(_MAX_LANES, _LANE_ELEMENTS // len(units)))
    done = 0
    state = _State(
        [0] * len(units), [total // unit for unit in units], [total % unit for unit in units]
    )
    if len(units) <= _MAX_LANE_DATASETS and _fits_in_lanes(units, num_samples):
        schedule = _Lanes(units, tie_ranks)
        while num_samples - done >= lanes:
            steps = min(_LANE_STEPS, (num_samples - done) // lanes)
            block = choice[done : done + lanes * steps].reshape(lanes, steps)
            state = schedule.fill(block, done, state)
            done += lanes * steps
    rest = islice(_choose_one_by_one(units, tie_ranks, state, done), num_samples - done)
    choice[done:] = np.fromiter(rest, np.uint16, num_samples - done)
    return choice


def _fits_in_lanes(units: Sequence[int], num_samples: int) -> bool:
    """Return whether no number that lanes compute reaches `_MAX_INT`."""
    latest = num_samples + 3 * (sum(units) // min(units) + 1)
    return 2 * sum(units) < _MAX_INT and (latest << len(units).bit_length()) < _MAX_INT


def _choose_one_by_one(
    units: Sequence[int], tie_ranks: Sequence[int], state: _State, start: int
) -> Iterator[int]:
    """Yield the dataset of sample `start` and of all that follow. Changes `state`."""
    total = sum(units)
    size = len(units)
    quotients = [total // unit for unit in units]
    remainders = [total % unit for unit in units]
    dataset_by_rank = [0] * size
    for k, rank in enumerate(tie_ranks):
        dataset_by_rank[rank] = k
    opens = state.opens
    floor = state.floor
    residue = state.residue
    due: list[int] = []  # heap of deadline * size + tie rank, of windows that are open
    upcoming: dict[int, list[int]] = {}  # by the time at which the window opens
    for k in range(size):
        key = (floor[k] + (residue[k] > 0)) * size + tie_ranks[k]
        if opens[k] <= start:
            due.append(key)
        else:
            upcoming.setdefault(opens[k], []).append(key)
    heapq.heapify(due)
    t = start
    while True:
        for key in upcoming.pop(t, ()):
            heapq.heappush(due, key)
        rank = heapq.heappop(due) % size
        k = dataset_by_rank[rank]
        opening = floor[k]
        closing = opening + quotients[k]
        rest = residue[k] + remainders[k]
        if rest >= units[k]:
            rest -= units[k]
            closing += 1
        opens[k] = opening
        floor[k] = closing
        residue[k] = rest
        key = (closing + (rest > 0)) * size + rank
        t += 1
        if opening <= t:
            heapq.heappush(due, key)
        else:
            upcoming.setdefault(opening, []).append(key)
        yield k


class _Lanes:
    """Chooses the samples of several stretches of a run at the same time.

    Args:
        units, tie_ranks: as in `interleave`.
    """

    def __init__(self, units: Sequence[int], tie_ranks: Sequence[int]):
        self._units = units
        self._tie_ranks = tie_ranks
        self._total = sum(units)
        self._units_K = np.array(units, np.int64)
        self._quotients_K = self._total // self._units_K
        self._remainders_K = self._total % self._units_K
        self._ranks_K = np.array(tie_ranks, np.int64)
        self._rank_bits = len(units).bit_length()
        self._dataset_by_rank = np.argsort(self._ranks_K)

    def fill(self, choice_LS: np.ndarray, start: int, first: _State) -> _State:
        """Choose consecutive samples, those of lane 0 first.

        Args:
            choice_LS: the datasets, which are set.
            start: number of the first sample.
            first: state before it.

        Returns:
            The state after the last sample.
        """
        lanes, steps = choice_LS.shape
        state = self._guess_states(start, lanes, steps)
        guessed = state.copy()
        state.set_column(0, first)
        guessed.set_column(0, first)
        choice_LS[:] = self._advance(state, start + steps * np.arange(lanes), steps).T
        ends_wrong = False
        suspects_L = (guessed.floor[:, 1:] != state.floor[:, :-1]).any(axis=0)
        for lane in range(1, lanes):
            if suspects_L[lane - 1] or ends_wrong:
                before = state.column(lane - 1)
                ends_wrong = self._repair(
                    choice_LS[lane], start + lane * steps, before, guessed.column(lane)
                )
                if ends_wrong:
                    state.set_column(lane, before)
        return state.column(lanes - 1)

    def _guess_states(self, start: int, lanes: int, steps: int) -> _State:
        """Guess the state at the start of each lane, [K, L].

        Of the datasets that may have given one sample more than floor(w * t), those are taken
        to have done so whose windows close first.
        """
        shape = (len(self._units), lanes)
        given_KL = np.empty(shape, np.int64)  # floor(w * t)
        part_KL = np.empty(shape, np.int64)  # w * t - floor(w * t), in units of 1 / T
        given_K, part_K = self._divide(start)
        step_given_K, step_part_K = self._divide(steps)
        for lane in range(lanes):
            given_KL[:, lane] = given_K
            part_KL[:, lane] = part_K
            part_K = part_K + step_part_K
            carry_K = part_K >= self._total
            part_K -= self._total * carry_K
            given_K = given_K + step_given_K + carry_K
        times_L = start + steps * np.arange(lanes)
        units_K1 = self._units_K[:, None]
        # The next window opens at floor(given * T / u), and given * T = t * u - part.
        elapsed_KL = -(-part_KL // units_K1)
        state = _State(
            times_L - elapsed_KL, times_L - elapsed_KL, elapsed_KL * units_K1 - part_KL
        )
        everything = np.arange(part_KL.size)
        self._next_sample(state, everything, everything // lanes)
        keys_KL = self._keys(state.floor, state.residue, self._ranks_K[:, None])
        keys_KL[part_KL == 0] = _MAX_INT
        ahead_L = times_L - given_KL.sum(axis=0)
        order_KL = np.argsort(np.argsort(keys_KL, axis=0), axis=0)
        ahead = np.flatnonzero(order_KL < ahead_L)
        self._next_sample(state, ahead, ahead // lanes)
        return state

    def _divide(self, t: int) -> tuple[np.ndarray, np.ndarray]:
        """Return floor(w * t) of each dataset and the rest, in units of 1 / T."""
        pairs = [divmod(unit * t, self._total) for unit in self._units]
        quotients, rests = zip(*pairs)
        return np.array(quotients, np.int64), np.array(rests, np.int64)

    def _next_sample(self, state: _State, places: np.ndarray, datasets: np.ndarray) -> None:
        """Advance `places` of the flattened [K, L] state, of these datasets, by one sample."""
        opens = state.floor.reshape(-1)[places]
        rest = state.residue.reshape(-1)[places] + self._remainders_K[datasets]
        rest -= self._units_K[datasets]
        carry = rest >= 0
        rest[~carry] += self._units_K[datasets[~carry]]
        state.opens.reshape(-1)[places] = opens
        state.floor.reshape(-1)[places] = opens + self._quotients_K[datasets] + carry
        state.residue.reshape(-1)[places] = rest

    def _keys(self, floor: np.ndarray, residue: np.ndarray, ranks: np.ndarray) -> np.ndarray:
        """Return integers that sort by the end of the window, then by tie rank."""
        return (floor + (residue > 0)) << self._rank_bits | ranks

    def _advance(self, state: _State, times_L: np.ndarray, steps: int) -> np.ndarray:
        """Choose the next samples of all lanes, [S, L], and advance their states."""
        keys_KL = self._keys(state.floor, state.residue, self._ranks_K[:, None])
        keys = keys_KL.reshape(-1)
        lanes = len(times_L)
        lane_L = np.arange(lanes)
        times_L = times_L.copy()
        masked_KL = np.empty_like(keys_KL)
        choice_SL = np.empty((steps, lanes), np.uint16)
        rank_mask = (1 << self._rank_bits) - 1
        for choice_L in choice_SL:
            # Where the window is not open yet, the difference is negative, and its sign bit,
            # copied to all bits, makes the key the largest unsigned number.
            np.subtract(times_L, state.opens, out=masked_KL)
            np.right_shift(masked_KL, 63, out=masked_KL)
            np.bitwise_or(masked_KL, keys_KL, out=masked_KL)
            first_L = np.minimum.reduce(masked_KL.view(np.uint64), axis=0).view(np.int64)
            dataset_L = self._dataset_by_rank[first_L & rank_mask]
            choice_L[:] = dataset_L
            places_L = dataset_L * lanes + lane_L
            self._next_sample(state, places_L, dataset_L)
            keys[places_L] = self._keys(
                state.floor.reshape(-1)[places_L],
                state.residue.reshape(-1)[places_L],
                self._ranks_K[dataset_L],
            )
            times_L += 1
        return choice_SL

    def _repair(self, choice_S: np.ndarray, start: int, state: _State, guessed: _State) -> bool:
        """Choose the samples of a lane again, until both orders have given the same samples.

        Args:
            choice_S: samples that follow from `guessed`; corrected in place.
            start: number of the first of them.
            state: true state before it; when the result is True, the state after the lane.

        Returns:
            Whether the orders still differ at the end of the lane.
        """
        surplus = [0] * len(self._units)  # samples of each dataset, true minus guessed
        for k, (right, wrong) in enumerate(zip(state.floor, guessed.floor)):
            surplus[k] = (right > wrong) - (right < wrong)
        differing = sum(map(bool, surplus))
        choices = _choose_one_by_one(self._units, self._tie_ranks, state, start)
        wrong_choices = choice_S.tolist()
        for i, wrong in enumerate(wrong_choices):
            if not differing:
                return False
            right = next(choices)
            choice_S[i] = right
            for k, change in ((right, 1), (wrong, -1)):
                differing -= surplus[k] != 0
                surplus[k] += change
                differing += surplus[k] != 0
        return differing > 0
