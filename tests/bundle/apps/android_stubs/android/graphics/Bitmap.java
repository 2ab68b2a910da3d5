package android.graphics;

public final class Bitmap {
    public enum Config { ARGB_8888, HARDWARE }
    public final int getWidth() { return 0; }
    public final int getHeight() { return 0; }
    public final Config getConfig() { return null; }
    public Bitmap copy(Config config, boolean isMutable) { return null; }
    public void getPixels(int[] pixels, int offset, int stride, int x, int y, int width, int height) {}
}
