"""Files that PyTorch 2.13 wrote (kept here as text), broken files and hostile files."""

import argparse
import base64
import pathlib
import pickle
import zipfile
import zlib

import ml_dtypes
import numpy as np
import pytest

from jaxgen.interop import torch_pickle

FIXTURES = pathlib.Path(__file__).parents[3] / "shared" / "fixtures"

# torch.save(..., _use_new_zipfile_serialization=True and False) of the object that `check` spells out in numpy.
ZIP = (
    "c-p0yYjYD-7{@nho0d>|14Jrf710!F$gR0RX-bMIxCrfXF(MGR$)<^Hvw3z;3I!_#YymGQhz{d84&#iULB|(P$9Fp8IQohg&gkeX#&P@tYCV^9"
    "yJvfoW~XP9wCDeO{^zpKbJ9VvrdALd8iWN`i_j*>dL~~OQ+8!#BzsF|)nuYcILTd;&Iu4asX8ne)v}5Tj!Z^VRV9N8TG4PH(X)!KWcL>`$PLa;"
    "32Hp48r(NiMo^nU8s>Y`WmHfNcUo75%LO%?MoQ7p^z>N34Rsz*svdVYa8G$e0T+|Fld2}8qwJS%s82a?A0IR@bg2w$#6|?}A+b($iq2_RE7ppR"
    "X=uEWCl=NrXp*2g<-(m&SuZMCXvyP9c~`zZ-"
    ";k%;)*(^AqMB)F6CGmhG^}UZ4G1<$@Cel!C0&uTuxU<9UHIWqOmHCBOb9h3dOLn2Ov7W0um!>65^QCJjI7E!Ji!Q+vF+E&!>VEqu7hF&@Fc@Ng"
    "|VHT47Clx(-"
    "Lf_ldp`H&^SE9c?rU^SR^3u5HEsQHw~S5O7KkVV1VZk?3AD@<;0zbbKvECB<Ljj!={s66dD2_hB^`W3Dh|S0nsr9K?V#V=$0Uy!dptn%W4iH9P"
    "$AEm5GZ|TsOqnz;+WHChZ}&9){bCpjU!8UDiT41brOskX9TqY5OQG3<+kgzhZ7bp*_!NNdyBD9ALCy01k4rgT?s`^#X-"
    "OKxEbqRjj>8ZigA{2!cTgh8WBr28n|m&1?ER?kL4Y;TXdmui#FQ+e-"
    "|WLh!N#C+SKQqVNhw>(9%&2|Gn$F*wa&XDYBXxxLC@GJ;_VG89&hLY80FaWucV6xzq{gB+ucRA_l}D=^w?2+m5N(lyPg@(7IbJWW$gUXk(qps{"
    "5rRh9t=PiH&>0g|9hcWp`5<xv=0A`#HPDoD}YaL(M=G(Z5(vjF4NFnP)@;71+r?29bO>j)+!c;h<#aOoOMN^rSMhal@C23*PD7mPO)_hB5uD9I"
    "V@{%YrCcyj`#JT!=^!}LJBJ^b4rTl%}G)F@m~;M&|0;}34Qj-"
    "%ovabpVJlHhGRrYssSDez9ETaG+LL7d9orB8fT87pKIxLNrt`{;)EC_huq%J4oJ#VrYLmxn3NKuXDg4^G1!4;d(3eHlKyehofS%HBb-"
    "z9D+^7x@zIO4{I(>3oyWW2SR&PSZzalpa%b1E=X^B5KR(|Nrt62Vea4^Ht)Dw51)i3z2yTm5iR2)xt<|R4JllBDfk8;SezpKL-"
    "!UnmLy>&?>}D1H<?+&`5DgCibj)@c2>-2&oG3Ftzvh&18vP%X(-Mdbz5)%a=^-uEGGLPR8-"
    "A5C7mciQ7HgW^nrzH(?*H<+yd==G#Y{o}b9|`bfoG!RZFxsXv)$5f;Xui4&%_{r)Mkhig}0_VLU>GSO4b^jF63?js(IvDOD9XoKlNSkyxg?;%*"
    "t{(p%13oSN(lktuj;{9&dcYm&8{<^E3zuAi<dTe0F#+9F+CLzH`4<{47RYjj$KVhb>@`kt>Pkyqcg`Pl{cN5~>M3M>LL%aERc6OG;{P=GFz$)f"
    "HTJ8M*L!)0A{`UJ-%zv!<`Tv`Q|7vJWZsq*lY!C1ERUe-YAH!!?6W?Ebd<WfeUvK*+wetKo<5bEU!0BtRQ04w-"
    "xtq8c`#kRD^Vi}o_Lwfr0v=hdi=dlC{_)e1<13GUs}Ptk;B*2EMK9nAenBSR_R@uHGU0tlBffCV7YxOGu~;M;^oK&hNVm@)3IxN!Xu$9D`D5Wo"
    "EE<i`Du1T2f82w8c&JMUF>Cs?9)emHIJbX~wX3ZMm`$AWhdN=YW0M_XJ%qG#kRg|_%*n^ju^uE^InGZOj(LEw%dOSDiIbnG7i?z_yVhF8c`ezL"
    "{NA@~t<{&;9<yr$bK1r0v-"
    "P@f*9Przt(BA4_N}pLLw2pT?(y0?c5Sy^Ypqhew#{wRhV5Ewwc)k*?AnN3YpoT$cEehmHfq;e6FslJZP&)^T5FPS=FioQ_Pw!SV_6d{FTS-"
    "vykKWp^CB;9TW1#s>|$$b<HdI^;w2twYsT5iM{W{U$c2NV%e8YZbJld3%JsI_&uZE0mrZjgAQ$<UmvFMuffdC%7t^e#{aN4t08rk96a"
)
LEGACY = (
    "c-nQ9S$Eq+6vu7ZNm?~2Wv8V;*d3t3TU47ZNfXi*wP~ZUh$R?Bp2RMS<-"
    "arvq$Q97aniEyFFf$b$H+(F@W$a2a84oI(I^fwYEEXX*?#{!ckbNTP_C=ajh|=!8ou=F#iOGe%K1MsRIekIGmoTFskY~G*LI!SD)aoN+d`Tqm_"
    "sz;G&y%zjkW4cs|97-RH>7%wOP$?US>Wr>&WKJKI-%vuE)`*D`tjT%@#+$o;9<A;kK4Bpl5?%PgBfaaqG-"
    "M+9p|t*_>2;^@3Mt9;;6`ZLUHYF_6iHG&|tP+T8W*#%L|zO~+Sj9$O5WPQAui%XhunYEeaBE@uu1Q)s5O%+N2Fs56dh@p;*)V!%91bE;*nq*aS"
    "ru~I2%6&#Q{?EnY$!C4M<PN%KtN(YDZte);*@LEF{G{kY(z%6FKa6{m=SRF?iq}%9kByw+UNZxI8dWt}q4sO@edbWc*B=1g+yA0eN^8B{PtUB("
    "w32$tSct?qsCf+f@%Lx1KrH@nx$0hGRj{6NfAbGasSRRHYFY?8-8!S4k>x>7xA}8|&p`w-ZcqkHim_$ZKB=`}IM-"
    "4m{9vxe0^EEvFKRZK2p;9Vo$Ppq%h!J6DO7H97334d;@kxn$isOWVQB$F%i%WPqX5*>wzzSN|%6!}v)%;kshyqC{BvBL+$|g#BdJ|=dALGyroD"
    "9RSVL3~v#01VzR~KIGaY3<M)$mN@f@cMsxX+2|c?o}kW8A=mjB~Aw$r$?_MSGWhDrR`0tO@p1WcYMs_=|!)BiW}p&KNi=*`*?0im}hO_QP234U"
    "cN2jB}CM=OeRcMRh@<FLKNoFeJL5VLpbQ7uUB7f4K)<)yS4tBKWHj{54UT68<{J8wTDC&$C&<TQT-j!}7Z5g}A%(nmEh1BXli7zauJ3q8B-"
    "A1N9IcRKVh)vc~s=c`1%Am5Su;<p|w~&`nWYlIV9i90Mz1m@GNgGFoxC>pESy+Y2w}D`-bYiRdUj0rw@Ga|8xf!yD7KJZlB--6VyDql`08#rw&"
    "Zs-%_Zbk`!a%i&hU<-bBXiZ0a$QgNN*LjxaehmDObTs81<5N^)$mVJC;(+_F+Or0e?zirvHuTMv=VsjmxT<BoO!`A8XW7_Y39-"
    "lf9E){tm+j~($4Hef&l``4&O?+nH^KgT8@h0GlXxfsvza`4ZUxtaO&Q_Z?!&lL$Y^wM=<l8~r!Z%_U-"
    "x~NXSd@<mXKf$fFW`rq*r=Hnd%%y|Tlk5IS7brFA_-"
    "S3os=_`q??jS%GTMWu<uJsKK)5ioR|p@B&C;wNoiM23g1IXVK<l*9YbtXoZx@{cKV`^^nTa)-uFMdySsz2=^NuzP0&A;4JyA-"
    "*`e|qmDFS^b%e?=mHgx$<L_OiyLNbIulGi(M|Ss0Iwqt}bVro#RHes`e*vrlHkk"
)


def content(text: str) -> bytes:
    return zlib.decompress(base64.b85decode(text))


@pytest.fixture(params=["zip", "legacy"])
def saved(request) -> bytes:
    return content(ZIP if request.param == "zip" else LEGACY)


def test_reads_what_torch_wrote(saved, tmp_path):
    path = tmp_path / "x.pth"
    path.write_bytes(saved)
    tree = torch_pickle.load(path)
    base = np.arange(12, dtype=np.float32).reshape(3, 4)
    want = {
        "cut": base[1:, 1:3],
        "turned": base.T,
        "spread": np.full((3, 2), 1.5, np.float32),
        "scalar": np.float64(3.25).reshape(()),
        "empty": np.zeros((0, 5), np.float32),
        "bf": np.array([1.0, -2.5], ml_dtypes.bfloat16),
        "half": np.array([65504.0], np.float16),
        "i64": np.array([-(2**62), 5]),
        "i32": np.array([-2], np.int32),
        "i16": np.array([-3], np.int16),
        "i8": np.array([-4], np.int8),
        "u8": np.array([255], np.uint8),
        "flag": np.array([True, False]),
        "param": np.array([[1.0, 2.0]], np.float32),
    }
    assert list(tree["model"]) == list(want)
    for name, array in want.items():
        got = tree["model"][name]
        assert got.dtype == array.dtype and got.shape == array.shape, name
        np.testing.assert_array_equal(got, array, err_msg=name)
        assert not got.flags.writeable
    assert tree["args"] == {"lr": 1e-4, "size": (2, 3), "dtype": "float32", "device": "cuda:1"}
    assert tree["steps"] == [1, (2, "a", True)]


def test_storages_are_mapped_and_shared(tmp_path):
    (tmp_path / "x.pth").write_bytes(content(ZIP))
    model = torch_pickle.load(tmp_path / "x.pth")["model"]
    assert np.shares_memory(model["cut"], model["turned"])
    assert isinstance(model["cut"].base, np.memmap)


def test_compressed_and_big_endian_archives(tmp_path):
    """Some people zip their checkpoints again; some machines store the other end first."""
    (tmp_path / "x.pth").write_bytes(content(ZIP))
    want = torch_pickle.load(tmp_path / "x.pth")["model"]
    with zipfile.ZipFile(tmp_path / "x.pth") as old:
        with zipfile.ZipFile(tmp_path / "packed.pth", "w", zipfile.ZIP_DEFLATED) as new:
            for name in old.namelist():
                new.writestr(name, old.read(name))
        with zipfile.ZipFile(tmp_path / "big.pth", "w") as new:
            for name in old.namelist():
                data = b"big" if name.endswith("/byteorder") else old.read(name)
                new.writestr(name, data[::-1] if "/data/" in name else data)
    packed = torch_pickle.load(tmp_path / "packed.pth")["model"]
    for name, array in want.items():
        np.testing.assert_array_equal(packed[name], array)
    # Reversing a whole storage reverses its elements and the bytes of each.
    big = torch_pickle.load(tmp_path / "big.pth")["model"]
    np.testing.assert_array_equal(big["i64"], want["i64"][::-1])
    np.testing.assert_array_equal(big["bf"], want["bf"][::-1])
    np.testing.assert_array_equal(big["scalar"], want["scalar"])


def test_every_truncation_is_an_error(saved, tmp_path):
    path = tmp_path / "cut.pth"
    # The legacy file ends with a tensor's last byte, the zip with its directory: no prefix of either is complete.
    for length in [*range(0, len(saved), 97), len(saved) - 1]:
        path.write_bytes(saved[:length])
        with pytest.raises(ValueError, match="cut.pth: "):
            torch_pickle.load(path)


def test_other_files(tmp_path):
    with pytest.raises(ValueError, match="none.pth: no such file"):
        torch_pickle.load(tmp_path / "none.pth")
    (tmp_path / "pointer.pth").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match="pointer.pth: not a PyTorch checkpoint .*version https"):
        torch_pickle.load(tmp_path / "pointer.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(ValueError, match="plain.pth: .*a pickled dict"):
        torch_pickle.load(tmp_path / "plain.pth")
    np.savez(tmp_path / "arrays.npz", a=np.zeros(3))
    with pytest.raises(ValueError, match="arrays.npz: .*data.pkl"):
        torch_pickle.load(tmp_path / "arrays.npz")


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


def archive(path: pathlib.Path, data: bytes) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/data.pkl", data)


@pytest.mark.parametrize("wrap", [archive, pathlib.Path.write_bytes], ids=["zip", "legacy"])
def test_nothing_is_executed(wrap, tmp_path):
    victim = tmp_path / "victim"
    program = pickle.dumps({"weight": Hostile(victim)}, protocol=2)
    wrap(tmp_path / "hostile.pth", program)
    with pytest.raises(ValueError, match=r"hostile.pth: refused, .*(pathlib|getattr)"):
        torch_pickle.load(tmp_path / "hostile.pth")
    assert not victim.exists()
    pickle.loads(program)  # the same program does run elsewhere
    assert victim.exists()


# In pickle's own opcodes: c = name, ( t = tuple, R = call, b = set state, } = empty dict, Q = persistent object.
@pytest.mark.parametrize(
    "program, reason",
    [
        (b"\x80\x02cos\nsystem\n(X\x04\x00\x00\x00truetR.", "os.system"),
        (b"\x80\x02cbuiltins\neval\n(X\x01\x00\x00\x001tR.", "builtins.eval"),
        (b"\x80\x02ccollections\nOrderedDict.fromkeys\n.", "OrderedDict.fromkeys"),
        (b"\x80\x02ctorch\nload\n.", "torch.load"),
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(}K\x00))tR.", "a tensor over a dict"),
        (b"\x80\x02cargparse\nNamespace\n)\x81K\x01b.", "Namespace whose state"),
        (b"\x80\x02(X\x06\x00\x00\x00moduleK\x00K\x00K\x00K\x00tQ.", "'module'"),
        (b"\x80\x02ctorch\nFloatStorage\n(tR.", "not callable"),
        (b"\x80\x02ctorch\nFloatStorage\n}b.", "__dict__"),
    ],
)
def test_programs(program, reason, tmp_path):
    archive(tmp_path / "x.pth", program)
    with pytest.raises(ValueError, match=reason):
        torch_pickle.load(tmp_path / "x.pth")


@pytest.mark.parametrize("offset, size, stride", [(0, 4, 1), (2, 2, 1), (0, 2, 3), (-1, 1, 1), (2, 2, -1)])
def test_tensors_stay_inside_their_storage(offset, size, stride, tmp_path):
    """A storage of three floats with two more after it, and a tensor that reaches beyond it."""

    def number(n):
        return b"J" + int(n).to_bytes(4, "little", signed=True)

    def write(offset, size, stride):
        storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000NK\x03tQ"
        shape = number(offset) + b"(" + number(size) + b"t(" + number(stride) + b"t\x89}"
        with zipfile.ZipFile(tmp_path / "x.pth", "w") as file:
            file.writestr("a/data.pkl", b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + storage + shape + b"tR.")
            file.writestr("a/data/0", np.arange(5, dtype=np.float32).tobytes())

    write(1, 2, 1)
    np.testing.assert_array_equal(torch_pickle.load(tmp_path / "x.pth"), [1.0, 2.0])
    write(offset, size, stride)
    with pytest.raises(ValueError, match="x.pth: .*a tensor of size"):
        torch_pickle.load(tmp_path / "x.pth")


def test_shared_and_circular_containers(tmp_path):
    tree = []
    for _ in range(60):  # 2**60 leaves, if each reference were followed
        tree = [tree, tree]
    archive(tmp_path / "wide.pth", pickle.dumps(tree, protocol=2))
    assert len(torch_pickle.load(tmp_path / "wide.pth")) == 2
    tree = []
    tree.append(tree)
    archive(tmp_path / "round.pth", pickle.dumps(tree, protocol=2))
    with pytest.raises(ValueError, match="round.pth: .*Recursion"):
        torch_pickle.load(tmp_path / "round.pth")


@pytest.mark.skipif(not FIXTURES.is_dir(), reason=f"no checkpoints at {FIXTURES}")
def test_published_layouts_as_torch_reads_them():
    torch = pytest.importorskip("torch", reason="compares with PyTorch's own reader")
    paths = [p for p in FIXTURES.glob("*/*") if p.suffix in (".pth", ".pt", ".bin", ".ckpt", ".tar")]
    assert paths

    def compare(got, want):
        if isinstance(want, torch.Tensor):
            np.testing.assert_array_equal(got, want.numpy())
            assert got.dtype == want.numpy().dtype
        elif isinstance(want, dict):
            assert list(got) == list(want)
            for key in want:
                compare(got[key], want[key])
        elif isinstance(want, argparse.Namespace):
            compare(got, vars(want))
        else:
            assert got == want

    with torch.serialization.safe_globals([argparse.Namespace]):
        for path in paths:
            compare(torch_pickle.load(path), torch.load(path, weights_only=True))


def test_parameters_of_the_first_pytorch(tmp_path):
    """PyTorch 0.x wrote parameters as calls with a state, and views of storages (here elements 1 to 3 of five)."""
    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000NK\x05(X\x01\x00\x00\x00vK\x01K\x03ttQ"
    tensor = b"ctorch._utils\n_rebuild_tensor\n(" + storage + b"K\x01(K\x02t(K\x01ttR"
    parameter = b"ctorch.nn.parameter\nParameter\n(" + tensor + b"tR(\x88\x89}tb"
    for program in (tensor, parameter):
        with zipfile.ZipFile(tmp_path / "x.pth", "w") as file:
            file.writestr("a/data.pkl", b"\x80\x02" + program + b".")
            file.writestr("a/data/0", np.arange(5, dtype=np.float32).tobytes())
        np.testing.assert_array_equal(torch_pickle.load(tmp_path / "x.pth"), [2.0, 3.0])
    archive(tmp_path / "y.pth", b"\x80\x02" + tensor + b"}b.")
    with pytest.raises(ValueError, match="y.pth: refused, .*a tensor with a state of its own"):
        torch_pickle.load(tmp_path / "y.pth")
