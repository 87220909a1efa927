"""tools/leave_out_drive.py."""

from pathlib import Path

from conftest import write_pair

from datasets.camvid import CamVid


def make_drives(root: Path) -> Path:
    for drive, count in (("0001TP", 2), ("0006R0", 3), ("0016E5", 1)):
        for number in range(count):
            name = f"{drive}_{number:06d}.png"
            image, label = root / "train" / name, root / "trainannot" / name
            write_pair(image, label, (72, 96), range(12), seed=number)
    return root


def test_the_drive_is_val_and_the_others_are_train(script, tmp_path):
    camvid, output = make_drives(tmp_path / "camvid"), tmp_path / "out"
    options = ("--datadir", camvid, "--drive", "0006R0", "--output", output)
    result = script("tools/leave_out_drive.py", *options)
    assert result.status == 0 and "3 pairs in train, 3 of 0006R0 in val" in result.out
    train, val = (CamVid(output, split) for split in ("train", "val"))
    names = [[Path(image).name[:6] for image, _ in split.pairs] for split in (train, val)]
    assert names == [["0001TP", "0001TP", "0016E5"], ["0006R0"] * 3]
    expected = CamVid(camvid, "train")[2]
    assert all((a == b).all() for a, b in zip(val[0], expected, strict=True))


def test_an_unknown_drive_is_refused(fails, tmp_path):
    camvid, output = make_drives(tmp_path / "camvid"), tmp_path / "out"
    options = ("--datadir", camvid, "--output", output)
    message = fails("tools/leave_out_drive.py", "--drive", "Seq05VD", *options)
    assert "Seq05VD is not one of several drives: 0001TP, 0006R0, 0016E5" in message
    assert not output.exists()
