"""Icon search from scratch: a 1 M-parameter Qwen2.5-VL learns to find a drawing by its name, in minutes on two CPU cores."""
from ml_collections import ConfigDict

def get_config(arg=None):
    config = ConfigDict()
    config.name = "tiny"
    config.seed = 0
    config.init_from = ""                  # a run directory to start the weights from
    config.backbone = "qwen2_5_vl"
    config.dtype = "float32"               # of activations and matmuls: float32 | bfloat16
    config.model = ConfigDict(dict(        # keys of Hugging Face's config.json
        text_config=dict(hidden_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, intermediate_size=384,
             rms_norm_eps=1e-6, rope_theta=10000.0, mrope_section=(4, 6, 6), tie_word_embeddings=True, vocab_size=2048),
        vision_config=dict(hidden_size=128, depth=4, num_heads=4, intermediate_size=384, patch_size=14, spatial_merge_size=2,
               window_size=112, fullatt_block_indexes=(1, 3), out_hidden_size=128)))
    config.query_tokens = 16
    config.candidate_tokens = 64
    config.embedding_dim = 32              # width of the head; 0: no head
    config.groups = ((1, 1), (2, 4), (4, 8), (8, 16), (16, 64))
    config.temperature = 0.03
    config.normalization = "code"
    config.data = ConfigDict(dict(
        dir="data", sources=(("icons", 1.0),), negatives=0,
        query_shapes=((48, 0),), candidate_shapes=((40, 64),),   # (tokens, patches) per shape class
        min_pixels=112*112, max_pixels=112*112, workers=0))
    config.mesh = ConfigDict(dict(data=-1, fsdp=1, tensor=1))     # -1: all devices that the others leave
    config.batch_size = 128
    config.microbatch_size = 128
    config.steps = 1500
    config.optimizer = ConfigDict(dict(learning_rate=1e-3, warmup_steps=100, schedule="cosine", b1=0.9, b2=0.98, eps=1e-8, weight_decay=0.05, clip=1.0))
    config.log_every = 10; config.eval_every = 250; config.checkpoint_every = 250; config.keep = 2
    return config
