"""Layer specifications by model family: `mindspeed_llm.tasks.models.spec.<family>_spec`, attribute `layer_spec`."""
