"""Pictures, as Matplotlib figures and as interactive pages.

Nothing here touches pyplot or its global state. Figures are saved with `.savefig(path)`, as PNG, SVG or PDF; a page is
a string of HTML that opens in a browser offline: `Path("flow.html").write_text(page)`.
"""

from ssm_interp.plots.agreement import agreement_figure
from ssm_interp.plots.answers import answers_figure
from ssm_interp.plots.attention import attention_figure, attention_panels
from ssm_interp.plots.attribution import attribution_figure
from ssm_interp.plots.circuit import circuit_figure
from ssm_interp.plots.edges import EDGE_LABEL, edge_figure
from ssm_interp.plots.flow import depth_figure, features_figure, flow_figure, stream_figure
from ssm_interp.plots.heatmap import TokenMap, heatmap_figure
from ssm_interp.plots.hover import attention_page, circuit_page, edges_page
from ssm_interp.plots.html import flow_page, heatmap_page
from ssm_interp.plots.panels import STATISTICS, StatisticName
from ssm_interp.plots.spectrum import QUANTILES, quantiles, spectrum_figure
from ssm_interp.plots.style import MOST_GROUPS, STYLES, short, token_label

__all__ = [
    "EDGE_LABEL",
    "MOST_GROUPS",
    "QUANTILES",
    "STATISTICS",
    "STYLES",
    "StatisticName",
    "TokenMap",
    "agreement_figure",
    "answers_figure",
    "attention_figure",
    "attention_page",
    "attention_panels",
    "attribution_figure",
    "circuit_figure",
    "circuit_page",
    "depth_figure",
    "edge_figure",
    "edges_page",
    "features_figure",
    "flow_figure",
    "flow_page",
    "heatmap_figure",
    "heatmap_page",
    "quantiles",
    "short",
    "spectrum_figure",
    "stream_figure",
    "token_label",
]
