"""Custom nodes for ComfyUI. Link this folder into `custom_nodes`; the package must be installed beside ComfyUI.

folder=$(python -c 'import srds_fast.integrations.comfyui as nodes; print(nodes.__path__[0])')
ln -s "$folder" ComfyUI/custom_nodes/srds_fast
"""

# ComfyUI loads this file under a name of its own, so nothing can be imported relative to it
from srds_fast.integrations.comfyui.nodes import NODE_CLASS_MAPPINGS as NODE_CLASS_MAPPINGS
from srds_fast.integrations.comfyui.nodes import NODE_DISPLAY_NAME_MAPPINGS as NODE_DISPLAY_NAME_MAPPINGS
