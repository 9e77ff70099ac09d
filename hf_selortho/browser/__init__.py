"""The browser of an SAE's features: a Gradio page of Jinja templates, named endpoints and MCP tools."""

from importlib.util import find_spec

from ..errors import SelOrthoError

if find_spec("gradio") is None:
    raise SelOrthoError('the browser needs Gradio, which is not installed: pip install "hf_selortho[space]"')
