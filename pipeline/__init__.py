"""From archives to committed instance rows, on Ray: ``archive → shards → schedule → segment_actor → results``."""

from pipeline.results import Results, open_results

__all__ = ["Results", "open_results"]
