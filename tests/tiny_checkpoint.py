"""A checkpoint that takes a second, for the tests of extras/."""
import torch

import checkpoint
import data
import flags
import teachers

FLAGS = """--image-size 8 --train-images 80 --test-images 40 --vocab 8 --prototypes 16 --hidden 32
    --descriptor 1x4 --interpreter 1x4 --components 0 --neighbours 5 --device cpu""".split()


def save(path, *words):
    """Writes a student of 8 symbols of 8 for images of 8 x 8 pixels (N = 4 patches, width 64) with
    a random teacher, fitted to random images but not trained -> the path as a string."""
    args = flags.parse([*FLAGS, *words])
    teacher = teachers.small_vit(8, 4, 64, 1, 1).eval()
    student = checkpoint.STUDENTS[args.recipe](args, teacher.width)
    with torch.no_grad():
        x = data.normalize(torch.randint(256, (64, 3, 8, 8), dtype=torch.uint8))
        tokens = 5 * teacher(x)
        student.fit(lambda n, augmented=False: [tokens[:n] + augmented * torch.randn(tokens.shape)])
        for _ in range(30):         # statistics for BatchNorm, or all images get the same symbols
            student.describe(student.preprocess(tokens))
        if args.recipe == "stable":                 # untrained, it predicts nearly one CLS for all
            student.descriptor.cls_head.weight.mul_(5)
    torch.save({"config": checkpoint.config_of(args), "teacher": teacher.state_dict(),
                "student": student.state_dict()}, path)
    return str(path)
