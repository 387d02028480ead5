"""How long stages last on a device that the host runs ahead of: what its marks tell, and that nothing is made of what they do not."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from afd_ray.engine.device_times import WAITED_US, FFNMarks, FlightMarks, Stage, StreamMarks
from afd_ray.engine.gpu.compute import GPUCompute
from afd_ray.engine.kv_cache import PagedCache
from afd_ray.engine.local import LocalCluster
from afd_ray.engine.passage import Passage
from afd_ray.engine.sequence import Chunk
from afd_ray.engine.stage_costs import CostLine, FlightTimes, StageMeter
from afd_ray.handoff.device.device_mesh import DeviceMesh
from afd_ray.handoff.device.streams import TimedMark
from afd_ray.handoff.message import Kind, Message
from afd_ray.membership.epoch import Epoch
from afd_ray.models.checkpoint import Checkpoint
from afd_ray.models.step3 import AttentionHalf, FFNHalf, Routed
from tests.gpu_cluster import CONFIG, HERE, cluster, expected, group, requests, served, written
from tests.host_device import HostDevice, HostStream, HostTimedMark
from tests.triton_device import COMPILED

pytestmark = pytest.mark.skipif(COMPILED, reason="the device is one of threads")

LAYERS = CONFIG.num_hidden_layers
ATTENTION_US, FFN_US = 300.0, 450.0


class At:
    """A mark of a tape."""

    def __init__(self, at_us: float) -> None:
        self.at_us, self.is_passed = at_us, True

    def passed(self) -> bool:
        return self.is_passed

    def since_us(self, earlier: TimedMark) -> float:
        assert isinstance(earlier, At)
        assert self.is_passed
        assert earlier.is_passed
        return self.at_us - earlier.at_us


class Tape:
    """A stream whose clock a test turns on."""

    def __init__(self) -> None:
        self.now_us = 0.0
        self.marks: list[At] = []

    def __call__(self) -> At:
        self.marks.append(At(self.now_us))
        return self.marks[-1]

    def take(self, duration_us: float) -> None:
        self.now_us += duration_us


# --- the stand-in -----------------------------------------------------------------------------------------------------------


def test_a_stream_s_clock_is_read_as_it_comes_to_a_mark() -> None:
    stream = HostStream(pretends=True)
    earlier = stream.timed_mark()
    stream.take(250.0)
    later = stream.timed_mark()
    stream.take(999.0)
    stream.synchronize()
    assert later.since_us(earlier) == 250.0


def test_a_mark_that_has_not_been_passed_has_no_time() -> None:
    stream, going = HostStream(), threading.Event()
    earlier = stream.timed_mark()
    stream.run(lambda: going.wait() and None)
    later = stream.timed_mark()
    with pytest.raises(RuntimeError, match="not been passed"):
        later.since_us(earlier)
    going.set()
    stream.synchronize()
    assert later.since_us(earlier) >= 0


# --- an attention rank's marks ----------------------------------------------------------------------------------------------


def flown(tape: Tape, stream: StreamMarks, *, waits_us: Sequence[float], busy_us: Sequence[Sequence[int]]) -> FlightMarks:
    """A micro-batch through as many layers, alone; each takes 100 us up to its sending and 10 us behind it, the head 40."""
    marks = FlightMarks(stream)
    for wait_us, said_us in zip(waits_us, busy_us, strict=True):
        tape.take(100)
        marks.send(1)
        tape.take(10)
        marks.end()
        tape.take(3)
        marks.due(1)
        tape.take(wait_us)
        marks.begin(said_us)
    tape.take(40)
    marks.end()
    return marks


def test_a_stage_lasts_from_behind_its_wait_to_its_last_order() -> None:
    tape = Tape()
    stages = flown(tape, StreamMarks(tape), waits_us=(500, 0), busy_us=((300,), (300,))).stages()
    assert stages == [Stage(110, 0, 656), Stage(110, 503, 43), Stage(40, 3, 0)]


def test_a_stage_waits_from_the_end_of_whatever_the_stream_did_before() -> None:
    tape = Tape()
    stream = StreamMarks(tape)
    first = FlightMarks(stream)
    tape.take(100)
    first.end()
    tape.take(1000)  # nothing is there to be begun: that is no waiting
    second = FlightMarks(stream)
    tape.take(200)
    second.end()
    tape.take(7)
    first.begin((1,))
    first.end()
    second.begin((1,))
    second.end()
    assert [stage.waited_us for stage in first.stages()] == [0, 7]
    assert [stage.waited_us for stage in second.stages()] == [0, 0]


def crossings(marks: FlightMarks, *, alone: bool = True) -> tuple[list[float], float, int, float]:
    times = FlightTimes()
    assert marks.tell_of_ffn(times, alone=alone)
    assert times.transfers == times.carries
    assert times.transfer == times.carried
    return times.ffn_by_layer, times.transfer, times.transfers, times.transfer_at_most


def test_a_round_trip_for_which_the_stream_stood_waiting_tells_of_the_transfer() -> None:
    tape = Tape()
    marks = flown(tape, StreamMarks(tape), waits_us=(500, 600), busy_us=((300,), (200, 350)))
    assert crossings(marks) == ([300, 350], (513 - 300) + (613 - 350), 2, float("inf"))


def test_of_rows_that_were_there_before_the_stream_nobody_knows_when_they_came() -> None:
    tape = Tape()
    marks = flown(tape, StreamMarks(tape), waits_us=(WAITED_US - 1, 500), busy_us=((300,), (300,)))
    assert crossings(marks) == ([300, 300], 213, 1, float("inf"))


def test_an_ffn_that_was_measured_in_another_step_may_seem_to_take_more_than_the_round_trip() -> None:
    tape = Tape()
    assert crossings(flown(tape, StreamMarks(tape), waits_us=(100,), busy_us=((300,),)))[1:3] == (0, 1)


def test_where_other_ranks_rows_may_be_waited_for_the_least_is_an_upper_bound() -> None:
    tape = Tape()
    marks = flown(tape, StreamMarks(tape), waits_us=(900, 500, 600), busy_us=((300,), (300,), (300,)))
    assert crossings(marks, alone=False) == ([300, 300, 300], 0, 0, 213)


@pytest.mark.parametrize(("sent_at", "due_at"), [(None, 1), (1, 2)], ids=["others are in flight", "another is begun"])
def test_in_company_a_round_trip_tells_nothing_of_the_transfer(sent_at: int | None, due_at: int) -> None:
    tape = Tape()
    marks = FlightMarks(StreamMarks(tape))
    marks.send(sent_at)
    marks.end()
    marks.due(due_at)
    tape.take(500)
    marks.begin((300,))
    marks.end()
    assert crossings(marks) == ([300], 0, 0, float("inf"))
    assert len(tape.marks) == (4 if sent_at is None else 5), "marks that nobody reads cost the host time"


@pytest.mark.parametrize("busy_us", [((300,), (0,)), ((0,), (300,)), ((300,), (300, 0))])
def test_an_ffn_of_which_one_stage_is_unknown_is_unknown(busy_us: Sequence[Sequence[int]]) -> None:
    tape, times = Tape(), FlightTimes()
    marks = flown(tape, StreamMarks(tape), waits_us=(500, 500), busy_us=busy_us)
    assert not marks.tell_of_ffn(times, alone=True)
    assert (times.ffn_by_layer, times.transfers, times.transfer_at_most) == ([], 0, float("inf"))


def test_a_bound_of_the_transfer_is_what_micro_batches_are_chosen_by_until_one_is_known() -> None:
    meter, times = StageMeter(), FlightTimes()
    times.attended(100.0)
    times.fed(100.0)
    times.crossed_within(80.0)
    times.crossed_within(90.0)
    meter.add(times, rows=10, context_tokens=0, layers=1)
    assert meter.costs.transfer.duration_us(10) == pytest.approx(80, rel=0.01)
    times.crossed(40.0)
    for _ in range(100):
        meter.add(times, rows=10, context_tokens=0, layers=1)
    assert meter.costs.transfer.duration_us(10) == pytest.approx(40, rel=0.01)


# --- an FFN rank's marks ----------------------------------------------------------------------------------------------------

Told = tuple[str, int, int, int, int, int, int]


def fed(marks: FFNMarks, tape: Tape, layer: int, rows: int, duration_us: float, now_ns: int = 0) -> At:
    """One stage; its last mark."""
    marks.begin()
    tape.take(duration_us)
    marks.end(slot=0, layer=layer, step=1, rows=rows, now_ns=now_ns)
    return tape.marks[-1]


def test_an_ffn_stage_is_known_once_its_end_has_been_passed() -> None:
    told: list[Told] = []
    tape = Tape()
    marks = FFNMarks(tape, lambda *event: told.append(event))
    first, second = fed(marks, tape, 0, 8, 300), fed(marks, tape, 1, 8, 400)
    first.is_passed = second.is_passed = False
    marks.look(10**6)
    assert (marks.busy_us(0, 8), told) == (0, [])
    first.is_passed = True
    marks.look(10**6)
    assert (marks.busy_us(0, 8), marks.busy_us(1, 8), len(told)) == (300, 0, 1)
    second.is_passed = True
    marks.look(2 * 10**6)
    assert (marks.busy_us(0, 8), marks.busy_us(1, 8)) == (300, 400)
    assert [event[0] for event in told] == ["ffn", "ffn_wait", "ffn"]


def test_what_is_said_of_a_stage_is_the_newest_of_its_layer_and_of_about_as_many_rows() -> None:
    tape = Tape()
    marks = FFNMarks(tape, lambda *event: None)
    fed(marks, tape, 0, 8, 300)
    fed(marks, tape, 0, 15, 310)
    fed(marks, tape, 0, 100, 900)
    fed(marks, tape, 1, 8, 0.2)
    marks.look(0)
    assert [marks.busy_us(0, rows) for rows in (7, 8, 15, 16, 64, 128)] == [0, 310, 310, 0, 900, 0]
    assert marks.busy_us(1, 8) == 1, "0 says that nothing is known"


def test_stages_and_waits_lie_where_they_were_by_the_host_s_clock() -> None:
    told: list[Told] = []
    tape = Tape()
    marks = FFNMarks(tape, lambda *event: told.append(event))
    fed(marks, tape, 1, 8, 300, now_ns=0)
    marks.look(1_000_000)
    tape.take(50)
    fed(marks, tape, 2, 8, 400, now_ns=1_020_000)
    marks.look(9_000_000)
    assert told == [
        ("ffn", 0, 1, 1, 8, 700_000, 1_000_000),
        ("ffn_wait", 0, 0, 0, 0, 1_000_000, 1_050_000),
        ("ffn", 0, 2, 1, 8, 1_050_000, 1_450_000),
    ]


def test_no_stage_ends_before_it_was_ordered_nor_after_it_was_seen() -> None:
    told: list[Told] = []
    tape = Tape()
    marks = FFNMarks(tape, lambda *event: told.append(event))
    for ordered_ns, seen_ns in ((0, 1_000_000), (5_000_000, 6_000_000), (6_000_000, 5_100_000)):
        fed(marks, tape, 0, 8, 300, now_ns=ordered_ns if seen_ns > ordered_ns else 0)
        marks.look(seen_ns)
    assert [event[-1] for event in told] == [1_000_000, 5_000_000, 5_100_000]


# --- both loops -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    directory: Path = tmp_path_factory.mktemp("tiny")
    return written(directory)


class Slow(GPUCompute):
    """Whose halves take so long a layer by the clocks of their streams, while launching takes whatever it takes."""

    def __init__(self, attention: HostStream, ffn: HostStream) -> None:
        super().__init__(HERE, stays=True)
        self._attention, self._ffn = attention, ffn

    def begin(self, half: AttentionHalf, cache: PagedCache, chunks: Sequence[Chunk], slot: int) -> Passage:
        passage = super().begin(half, cache, chunks, slot)
        attend = passage.attend

        def slowly(layer: int) -> Routed:
            self._attention.take(ATTENTION_US)
            return attend(layer)

        passage.attend = slowly  # type: ignore[method-assign]
        return passage

    def ffn(self, half: FFNHalf) -> FFNHalf:
        made = super().ffn(half)
        made.register_forward_hook(lambda *_: self._ffn.take(FFN_US))
        return made


def waiting(mesh: DeviceMesh, stream: HostStream, duration_us: float) -> None:
    """Have the stream wait so long for each layer that comes back."""
    receive = mesh.receive

    def received() -> Message | None:
        message = receive()
        if message is None or message.header.kind is not Kind.PARTIAL:
            return message
        assert message.arrive is not None
        arrive = message.arrive

        def arrive_late() -> None:
            arrive()
            stream.take(duration_us)

        return message._replace(arrive=arrive_late)

    mesh.receive = received  # type: ignore[method-assign]


@contextmanager
def slow_cluster(checkpoint: Checkpoint, epoch: Epoch, wait_us: float, *, measurable: bool = True) -> Iterator[LocalCluster]:
    """One rank of each half. Not `measurable`: no timed mark of the FFN's is ever passed."""
    devices = [HostDevice(pretends=True) for _ in range(2)]
    attention, ffn = (device.stream() for device in devices)
    if not measurable:
        ffn.timed_mark = lambda: HostTimedMark(ffn.now_us)  # type: ignore[method-assign]
    with group(epoch, devices=devices) as meshes:
        waiting(meshes[0], attention, wait_us)
        with cluster(checkpoint, epoch, Slow(attention, ffn), meshes=meshes) as local:
            yield local


def test_both_halves_stages_are_timed_by_their_devices(checkpoint: Checkpoint) -> None:
    """With one micro-batch, whose waits the stream stands through: the transfer is known too."""
    asked = requests(prompts=(1,), max_tokens=6)
    with slow_cluster(checkpoint, Epoch(1, 1, 1, 1, 1), wait_us=700) as local:
        assert served(local, asked) == expected(checkpoint, asked)
        local.stop()
        loop, ffn = local.attention[0], local.ffn[0]
    flights, stages, ffn_stages = loop.flights, loop.recorder.stages_us(), ffn.recorder.stages_us()
    known = flights.count
    assert loop.steps == 6 > known > 0, "nothing is known of the FFN in the first step"
    assert flights.ffn_by_layer_us == (known * FFN_US,) * LAYERS
    assert flights.attention_by_layer_us[:LAYERS] == (known * ATTENTION_US,) * LAYERS
    assert flights.attention_by_layer_us[LAYERS] > 0, "the host's part of the head"
    assert (flights.transfers, flights.transfer_us) == (known * LAYERS, known * LAYERS * (700 - FFN_US))
    assert (stages["attention"].count, stages["attention"].total) == (6 * LAYERS, 6 * LAYERS * ATTENTION_US)
    assert (stages["attention_wait"].count, stages["attention_wait"].total) == (6 * LAYERS, 6 * LAYERS * 700)
    assert stages["head"].count == 6
    assert ffn_stages["ffn"].total == ffn_stages["ffn"].count * FFN_US > 0
    costs = loop.costs
    assert costs.ffn.duration_us(1) == pytest.approx(FFN_US, rel=0.01)
    assert costs.transfer.duration_us(1) == pytest.approx(700 - FFN_US, rel=0.01)


def test_an_ffn_that_nobody_has_measured_is_not_free(checkpoint: Checkpoint) -> None:
    """Of costs, flights and telemetry it is no part, and more micro-batches are not used for its sake."""
    asked = requests(prompts=(1, 1, 1, 1), max_tokens=4)
    with slow_cluster(checkpoint, Epoch(1, 1, 1, 1, 4, adaptive=True), wait_us=2000, measurable=False) as local:
        assert served(local, asked) == expected(checkpoint, asked)
        local.stop()
        loop, ffn = local.attention[0], local.ffn[0]
    assert loop.flights.count == 0 < loop.steps
    assert loop.recorder.runs("attention") == loop.steps * LAYERS
    assert (loop.costs.ffn, loop.costs.transfer) == (CostLine(), CostLine())
    assert loop.costs.attention.duration_us(4, 20) > 0
    assert ffn.recorder.runs("ffn") == 0 < ffn.steps
    assert loop.scheduler.in_use == 1


@pytest.mark.parametrize(("wait_us", "fewest"), [(FFN_US, 2), (FFN_US + 1500, 3)], ids=["no transfer", "a long one"])
def test_as_many_micro_batches_are_used_as_pay_by_these_times(checkpoint: Checkpoint, wait_us: float, fewest: int) -> None:
    asked = requests(prompts=(1, 1, 1, 1, 1, 1), max_tokens=8)
    used: list[int] = []
    with slow_cluster(checkpoint, Epoch(1, 1, 1, 1, 4, adaptive=True), wait_us=wait_us) as local:
        scheduler = local.attention[0].scheduler
        use = scheduler.use

        def noted(slots: int) -> None:
            used.append(slots)
            use(slots)

        scheduler.use = noted  # type: ignore[method-assign]
        assert served(local, asked) == expected(checkpoint, asked)
    assert used[0] == 1
    assert max(used) >= fewest
    assert fewest > 2 or max(used) == 2
