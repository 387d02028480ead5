"""What a policy is shown of a simulated cluster."""

from afd_ray.autoscaling.learning import StageBook
from afd_ray.autoscaling.values import Observation, Override
from afd_ray.engine.pipeline import Load, micro_batches_for
from afd_ray.simulation.serving.cluster import Cluster
from afd_ray.simulation.serving.measures import Course, Measures, Point
from afd_ray.simulation.serving.pools import Pools
from afd_ray.simulation.serving.rounds import PS_PER_S
from afd_ray.simulation.serving.scene import Scene


class Watch:
    """Looks at the cluster once a period."""

    def __init__(self, scene: Scene, cluster: Cluster, pools: Pools, measures: Measures) -> None:
        self.course = Course()
        self._scene, self._cluster, self._pools, self._measures = scene, cluster, pools, measures
        self._goals, self._period_s = scene.goals, scene.config.autoscaling.period_s
        self._book = StageBook()
        self._planned = (0, 0)  # the round that micro-batches were last chosen in, and the prompt tokens that had come by then

    def look(self, override: Override | None) -> Observation:
        """The present, and what happened since the last look."""
        self._sample()
        cluster, pools, recent = self._cluster, self._pools, self._measures.recent
        oldest = [at for rank in cluster.ranks if (at := rank.oldest_waiting_ps) is not None]
        oldest += [job.arrived_ps for job in cluster.homeless]
        tpot_ms, ttft_ms = self._measures.latencies()
        observation = Observation(
            counts=pools.counts,
            goals=self._goals,
            running=sum(rank.running for rank in cluster.ranks),
            waiting=sum(rank.waiting for rank in cluster.ranks) + len(cluster.homeless),
            context_tokens=sum(work.context_tokens for work in cluster.work),
            kv_used=max((rank.kv_used for rank in cluster.ranks), default=0.0),
            arrivals_s=recent.arrivals / self._period_s,
            prompt_tokens_s=recent.prompt_tokens / self._period_s,
            output_tokens_s=recent.tokens / self._period_s,
            completions_s=recent.completions / self._period_s,
            late_s=(recent.completions - recent.within) / self._period_s,
            queue_wait_s=(cluster.now_ps - min(oldest)) / PS_PER_S if oldest else None,
            tpot_mean_ms=recent.tpot_ms.mean,
            tpot_ms=tpot_ms,
            ttft_ms=ttft_ms,
            stages=self._measures.stages(self._scene.layers, cluster.micro_batches),
            costs=self._book.costs(len(cluster.ffn)),
            layers=self._scene.layers,
            micro_batches=self._scene.slots,
            start_delay_s=pools.start_delay_s,
            resize=pools.transition.resize if pools.transition else None,
            last_resize=pools.last,
            override=override,
        )
        self._note(observation)
        self._measures.turn()
        return observation

    def micro_batches(self) -> int:
        """As many as pay, decided as an attention rank does, by what the busiest one has to run."""
        cluster, config = self._cluster, self._scene.config.pipeline
        if config.micro_batches != "auto":
            return config.micro_batches
        busiest = max(cluster.work, key=lambda work: work.rows, default=None)
        if busiest is None or not busiest.rows:
            return cluster.micro_batches
        load = Load(busiest.decoding, busiest.decoding, busiest.context_tokens, self._prompt_rows())
        costs, ranks = self._book.costs(len(cluster.ffn)), sum(work.rows > 0 for work in cluster.work)
        # An attention rank sees the FFN's time by its own rows.
        own = costs._replace(ffn=costs.ffn._replace(per_row_us=costs.ffn.per_row_us * ranks))
        return micro_batches_for(load, own, config.max_tokens_per_micro_batch, self._scene.slots, cluster.micro_batches)

    def _prompt_rows(self) -> int:
        """Of each attention rank in a round, since the last time that micro-batches were chosen: those of the present round alone come and go."""
        (rounds, tokens), now = self._planned, (self._measures.rounds, self._measures.whole.prompt_tokens)
        self._planned = now
        return (now[1] - tokens) // max(1, now[0] - rounds) // max(1, len(self._cluster.ranks))

    def _sample(self) -> None:
        """Stage times of the moment, for the cost lines."""
        seen = self._cluster.samples()
        if seen is None:
            return
        for rows, context, us in seen.attention:
            self._book.attended(rows, context, us)
        for rows, us in seen.transfer:
            self._book.carried(rows, us)
        rows, us = seen.ffn
        self._book.fed(rows, len(self._cluster.ffn), us)

    def _note(self, seen: Observation) -> None:
        tpot, ttft = seen.tpot_ms, seen.ttft_ms
        latencies = tpot.p95 if tpot else None, ttft.p95 if ttft else None
        now_s = round(self._cluster.now_ps / PS_PER_S, 3)
        self.course.add(Point(now_s, *seen.counts, seen.requests, seen.waiting, seen.arrivals_s, *latencies))
